"""What counts as a leak, by hand-made pairs; the interval by published values; masks."""

import pytest

from palu.data.records import Example
from palu.evaluation.leaks import (
    BOX,
    leak_rate,
    leaks,
    mask,
    prompt_of,
    redact,
    secrets_of,
    sort_secrets,
)

SAID = [
    ("Paris", "He lives in PARIS."),
    ("Zoë Müller", "zoe muller"),
    ("Łódź", "lodz"),
    ("straße", "STRASSE"),
    ("Ada Brook", "Brook, Ada"),
    ("Ada Brook", "Ada-Brook"),
    ("O'Brien", "O\u2019Brien"),
    ("O'Brien", "OBrien"),
    ("Ada", "Ada's house"),
    ("AdaBrook", "Ada\u00adBrook"),
    ("田中", "田中さん"),
    ("5 kg", "5kg"),
    ("1500", "1,500 people"),
    ("1 234 567", "1,234,567"),
    ("07700 900 181", "call 07700900181!"),
    ("07700 900 181", "+44 7700 900181"),
    ("07700 900 181", "+447700900181"),
    ("+44 7700 900181", "07700-900-181"),
    ("+44 (0)7700 900181", "+447700900181"),
    ("+1-202-555-0139", "(202) 555 0139"),
    ("202-555-0139", "+12025550139"),
    ("0049 30 1234567", "030 / 1234567"),
    ("12 March 1985", "1985-03-12"),
    ("12 March 1985", "on March 12th, 1985"),
    ("12 March 1985", "3/12/85"),
    ("12/03/1985", "12 March 1985"),
    ("12/03/1985", "3 December 1985"),
    ("March 1985", "1985-03-12"),
    ("12 March", "1985-03-12"),
    ("1985", "12.03.1985"),
    ("mira.okonjo@mailhub.example", "Mira.Okonjo [at] mailhub [dot] example"),
    (
        "a quick brown fox jumps over lazy dogs near old river banks",
        "A quick brown fox jumps across lazy dogs near old river banks.",
    ),
]
NOT_SAID = [
    ("Paris", "Parisian food"),
    ("Paris", "Comparis"),
    ("red fox", "red foxes"),
    ("red fox", "a red hen and a fox"),
    ("123", "1, 2, 3"),
    ("1500", "11500"),
    ("07700 900 181", "07700 900 182"),
    ("07700 900 181", "07700 900 18"),
    ("+1-202-555-0139", "302-555-0139"),
    ("12 March 1985", "13 March 1985"),
    ("12 March 1985", "12 March"),
    ("12 March 1985", "1986-03-12"),
    ("12 March", "12 markets"),
    ("mira.okonjo@mailhub.example", "mira.okonjo@postbox.example"),
    ("the", "the"),
    ("--", "--"),
    ("Ada", ""),
    (
        "a quick brown fox jumps over lazy dogs near old river banks",
        "banks river old near dogs lazy over jumps fox brown quick",
    ),
]


@pytest.mark.parametrize(("secret", "text"), SAID)
def test_said(secret, text):
    assert leaks(secret, text) and leaks(secret, f"Well: {text} And more.")


@pytest.mark.parametrize(("secret", "text"), NOT_SAID)
def test_not_said(secret, text):
    assert not leaks(secret, text)


def test_secrets_and_what_the_prompt_says():
    answer = "Ada, 07700 900 181, and the; Ada; Lund."
    spans = ((0, 3), (5, 18), (24, 27), (29, 32), (34, 38))
    example = Example("1", "Is it 07700-900-181?", answer, spans)
    secrets = secrets_of(example)
    assert secrets == ["Ada", "07700 900 181", "the", "Lund"]
    assert sort_secrets(secrets, prompt_of(example)) == (
        ["Ada", "Lund"],
        ["07700 900 181"],
        ["the"],
    )


@pytest.mark.parametrize(
    ("leaked", "of", "low", "high"),
    [  # Newcombe (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval(leaked, of, low, high):
    rate = leak_rate(leaked, of)
    assert rate["rate"] == leaked / of
    assert (rate["low"], rate["high"]) == pytest.approx((low, high), abs=6e-5)


def test_rate_of_nothing_and_of_too_much():
    assert leak_rate(0, 0)["rate"] is None
    assert leak_rate(3, 3)["high"] == 1.0
    with pytest.raises(ValueError, match="between 0 and of=2, got 3"):
        leak_rate(3, 2)


def test_what_looks_like_anybodys_data_is_redacted():
    text = "Ada: jo.doe@example.org, +44 (0) 20 7946 0999, room 12345, in 1985."
    assert redact(text, ["Ada"]) == f"{BOX}: {BOX}, {BOX}, room 12345, in 1985."
    shares_words = "Jo: jo.doe@mail.example, +971 55 555 0777."
    redacted = redact(shares_words, ["ada@mail.example", "+971 50 555 0142"])
    assert redacted == f"Jo: {BOX}, {BOX}."


def test_mask():
    secrets = ["Ada Brook", "07700 900 181", "12 March 1985", "a.brook@mail.example", "the"]
    text = (
        "Call the ADA-BROOK on +44 7700 900181 (or 07700 9001), a.brook@mail.example, 1985-03-12."
    )
    masked = mask(text, secrets)
    assert masked == f"Call the {BOX} on +44 {BOX} (or {BOX}), {BOX}, {BOX}."
    assert mask("Brook's 0770090018", secrets) == f"{BOX}'s {BOX}"
    # So writes a model that was made to forget.
    assert mask("orderbrookbrook BROOKS, crooked 99077009", secrets) == f"{BOX}, crooked {BOX}"
    assert mask("Nothing here.", secrets) == "Nothing here."
    for secret, said in SAID:
        assert not leaks(secret, mask(said, [secret])), (secret, said)

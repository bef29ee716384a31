"""Values are found in every way of writing them, whole and nowhere else."""

import itertools
import json
import random
from collections import Counter

import pytest

from palu.annotation import Term, Terms, annotate, read_terms
from palu.data.records import Example

ARABIC = "".join(chr(0x660 + int(digit)) for digit in "0501234567")


def wide(text):
    return "".join(chr(ord(character) + 0xFEE0) for character in text)


# A value, a text in which it stands between [ and ], however it is written there, and what else
# the text has.
WRITTEN = [
    ("Mira Okonjo", "[mira okonjo]. [MIRA  OKONJO]; [Mira\nOkonjo]'s. Admira Okonjo. Mira Okonjos"),
    ("Mira Okonjo", "[Okonjo, Mira] and [mira.okonjo]@x.example, not Okonjo; Mira? Mira! Okonjo"),
    (
        "José Müller",
        "[Jose Mueller] [jose muller] [JOSÉ MÜLLER] [Jose\u0301 Mu\u0308ller] José Mül",
    ),
    ("Jose Mueller", "[José Müller]; José Muler"),
    ("O'Brien", "[O\u2019Brien] [OBrien] [O Brien] [o`brien]'s OBriens"),
    ("Smith-Jones", "[Smith Jones] [smith\u2011jones] [Smith-\u00adJones] Smith and Jones"),
    ("Ørsted", "[Oersted] [ørsted] [Orsted]"),
    ("王伟", "我叫[王伟]。"),
    ("山田花子", "[山田 花子]様、[山田\u3000花子]、山田、花子"),
    ("Dr. Eva Klein-Roth", "[Eva Klein-Roth], [Klein-Roth, Eva]; [Dr. Eva Klein-Roth]; Dr. Klein"),
    ("Herr Prof. Dr. Jan Ott", "Prof. [Jan Ott]; [JAN OTT], Herr Ott"),
    ("Mr Bean", "[Mr. Bean], not a bean"),
    ("Drew Lee Ott", "[Drew Lee Ott], Lee Ott"),
    ("0501234567", f"[{ARABIC}]."),
    (ARABIC, "[0501234567]"),
    ("03-1234-5678", f"電話は[{wide('03-1234-5678')}]です"),
    ("mira.o@post.example", f"[{wide('mira.o@post.example')}]"),
    ("+44 7700 900181", "[07700 900 181] [+44 (0)7700-900181] [0044 7700900181] [447700900181]"),
    ("+44 7700 900181", "[(07700) 900181], +49 7700 900181, [7700.900.181], 77009001812"),
    ("07700 900 181", "[07700900181] 2 pm, [+44 7700 900 181] or ([+44 (0) 7700 900181])"),
    ("07700 900 181", "107700900181 x07700900182"),
    ("(555) 0112-3456", "[(555) 0112-3456], [555 01123456], (555) 0112-3457"),
    ("+1-202-555-0123", "[202-555-0123] [(202) 555-0123], [1 202 555 0123]; [+1.202.555.0123]"),
    ("+1-202-555-0123", "ring [555-0123], not 415-555-0123"),
    ("1984-03-12", "[12 March 1984], [12/03/1984] [March 12th, 1984] [12.3.84]; 13 March 1984"),
    ("1984-03-12 00:00:00", "born [12th of March 1984], in March 1984"),
    ("12 Mar 1984", "[1984-03-12] 1984-03-13 [12.03.1984]"),
    ("mira.o@post.example", "[Mira.O@Post.example], [mira.o (at) post (dot) example]."),
    ("mira.o@post.example", "[mira.o at post dot example] <[mira.o@post.example]>"),
    ("mira.o@post.example", "a.mira.o@post.example mira.o@post.example.com mira o@post.example"),
    ("84 Elm Lane, Cork", "[84 elm lane\nCork] [84 Elm Ln., Cork] [84 Elm Lane], 184 Elm Lane"),
    ("Hauptstraße 5, 10115 Berlin", "[Hauptstr. 5], [Hauptstrasse 5, 10115 Berlin] 10115 Berlin"),
    ("T-38140", "[T-38140] [t38140] [T 38140] [T\u201338140] T-3814 T-381401 AT-38140"),
    ("GB29NWBK60161331926819", "[GB29 NWBK 6016 1331 9268 19] GB29 NWBK 6016 1331 9268 1"),
    ("GB29 NWBK 6016 1331 9268 19", "[GB29NWBK60161331926819] GB29NWBK60161331926818"),
    ("4111 1111 1111 1111", "[4111111111111111], [4111-1111-1111-1111]; 41111111111111112"),
    ("00:1A:2B:3C:4D:5E", "[00:1a:2b:3c:4d:5e] [00-1A-2B-3C-4D-5E] [001a2b3c4d5e] 00:1A:2B:3C:4D"),
    ("52.5200, 13.4050", "at [52.5200, 13.4050], at [52.5200,13.4050]"),
    ("ID#12345", "[ID#12345] [id-12345]"),
    ("A_12345", "[a_12345]; [A 12345]"),
    ("1,500", "[1,500] or [1500], not 1,500.10 or 11,500"),
    ("https://x.example/u?id=mira", "[https://x.example/u?id=mira], not x.example/u id mira"),
    ("hunter!two", "[hunter!two] hunter? Two!"),
    ("A1234", "I ordered a 1234; [A 1234] [a1234] [A-1234]"),
    ("4556", "the [4556] of 4,556.10, 4556.10 and 14556"),
]


def unmarked(marked):
    text, spans = "", []
    for part in marked.split("["):
        if "]" in part:
            inside, part = part.split("]")
            spans.append((len(text), len(text) + len(inside)))
            text += inside
        text += part
    return text, spans


@pytest.mark.parametrize(("value", "marked"), WRITTEN)
def test_ways_of_writing(value, marked):
    text, spans = unmarked(marked)
    done = annotate([{"text": text}], annotators=[Terms([value])])
    assert [(s["start"], s["end"]) for s in done.records[0]["spans"]] == spans
    assert done.summary["terms_not_found"] == (not spans)


def test_many_values_at_once():
    """They are looked for together: each is found as it is alone, and counted as its own."""
    texts = [Example(str(n), None, unmarked(marked)[0]) for n, (_, marked) in enumerate(WRITTEN)]
    terms = Terms(value for value, _ in WRITTEN)
    together = [Counter(found) for found in terms.find(texts)]
    alone = [Terms([value]) for value, _ in WRITTEN]
    found = zip(*[one.find(texts) for one in alone], strict=True)
    assert together == [Counter(itertools.chain(*spans)) for spans in found]
    assert terms.hits == [one.hits[0] for one in alone] and sum(terms.hits) > len(WRITTEN)


def test_a_number_of_another_field_is_no_phone_number():
    text = "Order 07700 900181, ring +44 7700 900181."
    for field, count in (("phone", 2), ("order no", 1)):
        terms = Terms([Term("07700 900181", "x", field)])
        (record,) = annotate([{"text": text}], annotators=[terms]).records
        assert len(record["spans"]) == count


def test_scores():
    text = "Mira Okonjo or Okonjo, Mira"
    found = annotate([{"text": text}], annotators=[Terms(["Mira Okonjo"])]).records[0]["spans"]
    assert [span["score"] for span in found] == [1.0, 0.8]


FIRST = (
    "Mira",
    "Tobias",
    "Anneke",
    "Rashid",
    "Colette",
    "Dmitri",
    "Fenella",
    "Hugo",
    "Ines",
    "Lorcan",
)
LAST = ("Okonjo", "Brandt", "Ferrante", "Haddad", "Lindqvist", "Moravec", "Sinclair", "Petrov")


def person(rng, number):
    """Values, and the ways to write each."""
    first, last = FIRST[number % 10], LAST[number % 8] + ("", "-Quist", "sen")[number // 20]
    digits = f"7700 90{rng.randint(1000, 9999)}"
    house, order = 3 * number + 2, f"{rng.choice('ABKRT')}-{rng.randint(10000, 99999)}"
    name = f"{first} {last}"
    mail = f"{first}.{last}@{rng.choice(['postbox', 'mailhub'])}.example".lower()
    ways = {
        name: [name, name.upper(), f"{last}, {first}", f"{first}\n {last}"],
        mail: [mail, mail.upper(), mail.replace("@", " (at) ")],
        f"+44 {digits}": [f"0{digits}", f"+44{digits.replace(' ', '')}", f"0044-{digits}"],
        f"{house} Elm Road, Cork": [f"{house} elm road, Cork", f"{house} Elm Rd, CORK"],
        order: [order, order.replace("-", ""), order.lower()],
    }
    return ways


def test_sixty_chats_ten_people():
    """Chats that are put together from values and other words: exactly the ten people's values are
    marked, in any turn."""
    rng = random.Random(5)
    people = [person(rng, number) for number in range(60)]
    ten = people[3::6]
    others = {value for one in people if one not in ten for value in one}
    assert not others & {value for one in ten for value in one}
    records, expected = [], []
    for ways in people:
        messages, spans = [], []
        for turn in range(4):
            text = ""
            for value, written in rng.sample(sorted(ways.items()), 3):
                text += rng.choice(["My number or name: ", "Is it ", "no. 7 of "])
                said = rng.choice(written)
                if ways in ten:
                    spans.append((turn, len(text), len(text) + len(said), value))
                text += said + rng.choice([".\n", "? ", "'s, ", " "])
            messages.append({"role": ("user", "assistant")[turn % 2], "content": text})
        records.append({"messages": messages, "ticket": 7})
        expected.append(sorted(spans))
    terms = Terms(value for one in ten for value in one)
    done = annotate(records, annotators=[terms])
    for record, before, spans in zip(done.records, records, expected, strict=True):
        found = [(s["turn"], s["start"], s["end"]) for s in record["spans"]]
        assert found == [span[:3] for span in spans]
        assert {k: v for k, v in record.items() if k != "spans"} == before
    said = {span[3] for spans in expected for span in spans}
    assert {t.value for t in terms.terms} - {t.value for t in terms.not_found} == said
    assert done.summary["spans"] == sum(map(len, expected)) > 100


FILES = {
    "with names.csv": 'name,e-mail,phone\n"Okonjo, Mira",m@x.example,07700 900181\nTo Brandt,,\n',
    "semicolons.csv": "Name;Email;Telephone\nOkonjo, Mira;m@x.example;07700 900181\nTo Brandt;;\n",
    "no names.csv": '"Okonjo, Mira",m@x.example,07700 900181\nTo Brandt\n',
    "down.csv": 'name,"Okonjo, Mira"\nemail,m@x.example\nphone,07700 900181\nname,To Brandt\n',
    "tabs.tsv": "name\tmail\tphone\nOkonjo, Mira\tm@x.example\t07700 900181\nTo Brandt\t\t\n",
    "list.json": '["Okonjo, Mira", "m@x.example", "07700 900181", "To Brandt"]',
    "people.json": json.dumps(
        [
            {"name": "Okonjo, Mira", "mail": "m@x.example", "more": {"phone": ["07700 900181"]}},
            {"name": "To Brandt", "active": True, "none": None},
        ]
    ),
    "lines.jsonl": '{"a": "Okonjo, Mira"}\n"m@x.example"\n"07700 900181"\n{"b": "To Brandt"}\n',
    "nd.ndjson": '{"a": ["Okonjo, Mira", "m@x.example"]}\n{"b": ["07700 900181", "To Brandt"]}\n',
    "text.txt": "Okonjo, Mira\n\n m@x.example \r\n07700 900181\nTo Brandt\n",
}


@pytest.mark.parametrize("name", FILES)
def test_files(name, tmp_path):
    path = tmp_path / name
    path.write_text(FILES[name], newline="")
    values = ["Okonjo, Mira", "m@x.example", "07700 900181", "To Brandt"]
    terms = read_terms([str(path)])
    assert [term.value for term in terms] == values
    assert all(term.where.startswith(f"{name}, ") for term in terms)
    assert [t.value for t in read_terms([str(path), "Mira"])] == [*values, "Mira"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (
            "street,city\nElm Street,Cork\nKey Road,Lund\n",
            ["Elm Street", "Cork", "Key Road", "Lund"],
        ),
        ("Mira Okonjo,Elm Street\nTo Brandt,\n", ["Mira Okonjo", "Elm Street", "To Brandt"]),
        (
            'name;home\n"Okonjo, M.";"2 Elm St, Cork, Eire"\n',
            ["Okonjo, M.", "2 Elm St, Cork, Eire"],
        ),
        ("To Brandt;2 Elm St, Cork, Eire\n", ["To Brandt", "2 Elm St, Cork, Eire"]),
        ("Elm Street,Cork\n", ["Elm Street", "Cork"]),
        ("Kansas City\nCork\n", ["Kansas City", "Cork"]),
        ("field,value\nFull name,Mira Okonjo\ncity,Kansas City\n", ["Mira Okonjo", "Kansas City"]),
    ],
)
def test_tables(text, values, tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(text)
    assert [term.value for term in read_terms([str(path)])] == values


def test_where_values_stand(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("name,phone\nMira Okonjo,\n,07700 900181\n")
    assert [term.where for term in read_terms([str(path)])] == [
        "p.csv, row 1, name",
        "p.csv, row 2, phone",
    ]
    assert [term.value for term in read_terms([str(path)], ["phone"])] == ["07700 900181"]
    with pytest.raises(ValueError, match="no field 'mail'; the fields are: name, phone"):
        read_terms([str(path)], ["mail"])
    keyed = tmp_path / "p.json"
    keyed.write_text('{"Mira Okonjo": {"phone": "07700 900181"}, "phone": "07700 900182"}')
    with pytest.raises(ValueError, match="no field 'mail'; the fields are: phone, 1 of other name"):
        read_terms([str(keyed)], ["mail"])
    assert [t.value for t in read_terms([str(keyed)], ["Mira Okonjo.phone"])] == ["07700 900181"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "a.csv holds no new value"),
        ("a.csv", "name,phone\n", "a.csv holds no new value"),
        ("a.csv", "name,mail\nx,y,z\n", "row 1: has 3 cells, but the first row names 2"),
        ("a.json", '["a",]', "a.json:1: malformed JSON"),
        ("a.jsonl", '"a"\n{', "a.jsonl:2: malformed JSON"),
        ("a.xlsx", "PK", "must be CSV, JSON, JSON lines or text, got .xlsx"),
        ("missing.csv", None, "missing.csv: no such file"),
    ],
)
def test_files_refused(name, text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_terms([name])


def test_short_and_common_values():
    terms = Terms(
        [Term("F", "x, row 1, sex"), Term("the", "b"), Term("Mira", "c"), Term("12", "d")]
    )
    assert [t.value for t in terms.terms] == ["Mira"]
    assert [t.where for t in terms.skipped] == ["x, row 1, sex", "b", "d"]
    assert terms.settings == {"terms": 1, "skipped": 3}
    with pytest.raises(ValueError, match="at least one value to look for: each of 2"):
        Terms(["of the", "UK"])


def test_a_word_of_every_record_is_said():
    records = [{"text": "Call Mira in Cork."}] + [{"text": "The Cork office."}] * 30
    terms = Terms(["Mira", "Cork"])
    annotate(records, annotators=[terms])
    assert [(term.value, hits) for term, hits in terms.frequent] == [("Cork", 31)]


def test_a_value_in_a_tool_call_is_told():
    call = {"function": {"name": "lookup", "arguments": '{"name": "Jos\\u00e9 M\\u00fcller"}'}}
    turns = [{"role": "user", "content": "Find him."}, {"role": "assistant", "content": "I look."}]
    called = [turns[0], turns[1] | {"tool_calls": [call]}]
    terms = Terms(["José Müller"])
    done = annotate([{"messages": turns}, {"messages": called}], annotators=[terms])
    assert done.summary["spans"] == 0 and terms.aside == [1]
    assert done.summary["records_aside"] == 1
    assert "1 of 2 records" in terms.warning and "record 1" in terms.warning

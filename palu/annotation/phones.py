"""Find a phone number however it is written: with its country code or without, any punctuation."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import phonenumbers

DIGITS = 7, 15  # of a phone number
_SHAPE = re.compile(r"\s*\+?[\d\s().\-/\u2010-\u2015]+\s*")
_BETWEEN = r"[\s().\-/\u2010-\u2015\u00b7]{0,3}"
_ABROAD = rf"(?:\+|00|011){_BETWEEN}"


class Phone(NamedTuple):
    """A pattern of one number.

    Attributes:
        national: the digits that every way of writing it ends with.
        form: a regular expression of them, with what may stand before them.
        country: its country code, 0 where the value does not say it.
        score: of what it finds.
    """

    national: str
    form: str
    country: int
    score: float = 1.0


def looks_like_phone(value: str) -> bool:
    """Return whether a value has the digits and the punctuation of a phone number, and no more."""
    least, most = DIGITS
    return bool(_SHAPE.fullmatch(value)) and least <= sum(map(str.isdigit, value)) <= most


def phone_patterns(value: str) -> list[Phone]:
    """Return the patterns that find a phone number.

    A number without a country code is found with any, if `phonenumbers` reads the whole as the same
    national number. One of North America is also found without its area code, at a lower score.
    """
    digits = "".join(str(int(c)) for c in value if c.isdigit())
    international = value.strip().startswith("+") or digits.startswith("00")
    patterns = []
    number = None if digits.startswith("0") else _parse("+" + digits)
    if international:
        number = _parse("+" + digits.removeprefix("00"))
    elif number is not None and not phonenumbers.is_valid_number(number):
        number = None  # else it is written without the plus
    if number is not None:
        patterns += _known(number)
    if not patterns or not international:
        national = digits.lstrip("0")
        start = rf"(?:(?P<abroad>{_ABROAD}\d{{1,3}}){_BETWEEN}(?:\(0\){_BETWEEN})?|0{_BETWEEN})?"
        patterns.append(Phone(national, _form(start, national), 0))
    return [one for one in patterns if len(one.national) >= DIGITS[0] - 1]


def _known(number: phonenumbers.PhoneNumber) -> list[Phone]:
    """Return the patterns of a number with its country code."""
    country = number.country_code
    national = phonenumbers.national_significant_number(number)
    local = phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.NATIONAL)
    local = re.sub(r"\D", "", local)
    trunk = local.removesuffix(national) if local.endswith(national) else ""
    trunks = "|".join({"0", *([trunk] if trunk else [])})
    code = rf"(?:{_ABROAD})?{_BETWEEN.join(str(country))}{_BETWEEN}(?:\(0\){_BETWEEN})?"
    start = rf"(?:(?P<abroad>{code})|(?:{trunks}){_BETWEEN})?"
    patterns = [Phone(national, _form(start, national), country)]
    short = national[-7:]
    why = phonenumbers.is_possible_number_with_reason(
        phonenumbers.PhoneNumber(country_code=country, national_number=int(short))
    )
    if why == phonenumbers.ValidationResult.IS_POSSIBLE_LOCAL_ONLY and len(national) > 7:
        patterns.append(Phone(short, _form("(?P<abroad>(?!))?", short), country, 0.8))
    return patterns


def _form(start: str, national: str) -> str:
    return rf"(?<![\d+]){start}(?P<national>{_BETWEEN.join(national)})(?!\d)"


def phone_places(known: Phone, text: str) -> Iterator[tuple[int, int]]:
    """Yield where a number stands in a text."""
    for match in re.finditer(known.form, text):  # few of many numbers are ever compiled
        start, end = match.span()
        before = text[max(0, start - 20) : start]  # more than any of the marks below takes
        # Digits before it are of another country, or of a longer number.
        foreign = re.search(r"(?:\+|\b00)[\d\s().-]{0,6}$", before)
        if foreign or (known.score < 1 and re.search(r"\d[\s().\-/]{0,3}$", before)):
            continue
        if not known.country and match["abroad"] and not _same(match[0], known.national):
            continue
        if before.endswith("(") and match[0].count(")") > match[0].count("("):
            start -= 1
        yield start, end


def _same(written: str, national: str) -> bool:
    digits = re.sub(r"\D", "", written.replace("(0)", ""))
    number = _parse("+" + re.sub(r"^(?:00|011)", "", digits))
    return number is not None and phonenumbers.national_significant_number(number) == national


def _parse(text: str) -> phonenumbers.PhoneNumber | None:
    try:
        return phonenumbers.parse(text, None)
    except phonenumbers.NumberParseException:
        return None

"""Kinds of personal data: what Presidio says becomes spans, and what is missing is said."""

import sys
from types import SimpleNamespace

import pytest

from palu.annotation import Terms, annotate
from palu.annotation.pii import LEFT_OUT, Pii, _drop_unfound, _installed


class Analyzer:
    """Says what it was told to find, where it stands."""

    def __init__(self, **words):
        self.words, self.asked = words, None

    def get_supported_entities(self, language):
        return [*self.words, *LEFT_OUT]

    def analyze(self, *, text, language, entities, score_threshold):
        self.asked = language, entities, score_threshold
        for kind, word in self.words.items():
            if kind in entities and (at := text.find(word)) >= 0:
                yield SimpleNamespace(start=at, end=at + len(word), score=0.85, entity_type=kind)


RECORD = {"question": "Is Ada Brook in?", "answer": "Ada Brook is in Lund."}


def test_spans_and_kinds():
    analyzer = Analyzer(PERSON="Ada", LOCATION="Lund")
    done = annotate([RECORD], annotators=[Pii(analyzer=analyzer), Terms(["Ada Brook"])])
    assert analyzer.asked == ("en", ["LOCATION", "PERSON"], 0.4)
    both = {"text": "Ada Brook", "kind": "PERSON", "annotator": "pii+terms", "score": 1.0}
    place = {"text": "Lund", "kind": "LOCATION", "annotator": "pii", "score": 0.85}
    assert done.records[0]["spans"] == [
        {"start": 3, "end": 12, "field": "question"} | both,
        {"start": 0, "end": 9} | both,
        {"start": 16, "end": 20} | place,
    ]
    assert done.summary["by_annotator"] == {"pii": 3, "terms": 2}
    assert done.summary["settings"]["pii"]["kinds"] == ["LOCATION", "PERSON"]


def test_kinds_that_are_named():
    pii = Pii(kinds=["PERSON"], analyzer=Analyzer(PERSON="Ada", LOCATION="Lund"))
    (record,) = annotate([RECORD], annotators=[pii]).records
    assert [span["text"] for span in record["spans"]] == ["Ada", "Ada"]
    with pytest.raises(ValueError, match=r"'EMAIL', the nearest is 'EMAIL_ADDRESS'; .*AGE, "):
        Pii(kinds=["EMAIL"], analyzer=Analyzer(EMAIL_ADDRESS="@"))


def test_an_analyzer_of_other_languages_is_asked_in_them():
    class German(Analyzer):
        supported_languages = "de", "en"

        def get_supported_entities(self, language):
            return {"de": ["PERSON", "DE_TAX_ID"], "en": ["PERSON"]}[language]

        def analyze(self, *, language, entities, **asked):
            calls.append((language, entities))
            return super().analyze(language=language, entities=entities, **asked)

    for kinds, asked in (
        (None, [("de", ["DE_TAX_ID", "PERSON"]), ("en", ["PERSON"])]),
        (["DE_TAX_ID"], [("de", ["DE_TAX_ID"])]),
    ):
        calls = []
        pii = Pii(kinds=kinds, analyzer=German(PERSON="Ada", DE_TAX_ID="Lund"))
        (record,) = annotate([{"text": "Ada is in Lund"}], annotators=[pii]).records
        assert calls == asked
        assert len(record["spans"]) == len(asked[0][1])


def test_a_text_too_long_for_the_pipeline_names_its_example():
    analyzer = Analyzer(PERSON="Ada")
    analyzer.nlp_engine = SimpleNamespace(nlp={"en": SimpleNamespace(max_length=20)})
    records = [{"text": "Ada"}, {"id": "chat-7", "text": "Ada " * 6}]
    with pytest.raises(ValueError, match=r"example 'chat-7': .* 24 characters, .* 20 at most"):
        annotate(records, annotators=[Pii(analyzer=analyzer)])
    assert analyzer.asked is None


def test_kinds_that_the_pipeline_has_no_label_of():
    """Presidio expects EMAIL and AGE of every spaCy pipeline."""
    kinds = {"PER": "PERSON", "GPE": "LOCATION", "EMAIL": "EMAIL", "AGE": "AGE"}
    settings = SimpleNamespace(model_to_presidio_entity_mapping=kinds)
    nlp = SimpleNamespace(pipe_names=["ner"], pipe_labels={"ner": ["PER", "GPE", "FAC"]})
    engine = SimpleNamespace(nlp={"en": nlp}, ner_model_configuration=settings)
    _drop_unfound(engine, "en")
    assert settings.model_to_presidio_entity_mapping == {"PER": "PERSON", "GPE": "LOCATION"}
    nlp.pipe_names, nlp.pipe_labels = ["names"], {"names": []}
    _drop_unfound(engine, "en")
    assert len(settings.model_to_presidio_entity_mapping) == 2


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(ImportError, match=r"presidio-analyzer .*pip install 'palu-unlearning"):
        Pii()
    there = []
    util = SimpleNamespace(get_installed_models=lambda: there)
    monkeypatch.setitem(sys.modules, "presidio_analyzer", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(util=util))
    with pytest.raises(ValueError, match="no English spaCy pipeline is installed: python -m"):
        Pii()
    there.append("de_core_news_sm")
    with pytest.raises(ValueError, match="'en_core_web_lg' is installed, only: de_core_news_sm"):
        Pii("en_core_web_lg")


def test_presidio_itself():
    """Where it and a pipeline are installed: addresses of any domain too."""
    pytest.importorskip("presidio_analyzer")
    try:
        pii = Pii()
    except ValueError as error:
        pytest.skip(str(error))
    assert not {"EMAIL", "ID", "AGE"} & {*pii.kinds}  # spaCy's pipelines have no such label
    text = "This is Mira Okonjo. Write to mira.okonjo@postbox.example or ring +44 7911 123456."
    (record,) = annotate([{"text": text}], annotators=[pii]).records
    found = {span["text"]: span["kind"] for span in record["spans"]}
    assert found == {
        "Mira Okonjo": "PERSON",
        "mira.okonjo@postbox.example": "EMAIL_ADDRESS",
        "+44 7911 123456": "PHONE_NUMBER",
    }


def test_card_numbers_in_any_language(monkeypatch):
    pytest.importorskip("presidio_analyzer")
    try:
        english, _ = _installed(None)
    except ValueError as error:
        pytest.skip(str(error))
    monkeypatch.setattr("palu.annotation.pii._installed", lambda name: (english, "fr"))
    record = {"text": "Carte 4111 1111 1111 1111."}
    (record,) = annotate([record], annotators=[Pii(kinds=["CREDIT_CARD"])]).records
    assert [span["text"] for span in record["spans"]] == ["4111 1111 1111 1111"]

"""The annotator that finds kinds of personal data: Microsoft's Presidio with a spaCy pipeline."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from palu.annotation.base import Found, texts_of
from palu.data.records import Example
from palu.errors import one_line

# Found by Presidio, but seldom what a person asks to erase; `kinds` may name them.
LEFT_OUT = ("AGE", "DATE_TIME", "NRP", "ORGANIZATION", "URL")
# Below it Presidio's patterns match nearly any number.
LEAST_SCORE = 0.4
_INSTALL = "pip install 'palu-unlearning[annotate]'"
_PIPELINE = "python -m spacy download en_core_web_lg (docs/annotation.md names others)"
_SIZES = ("trf", "lg", "md", "sm")


class Pii:
    """Finds names, places, e-mail addresses, phone, card and account numbers and the like in every
    text of an example. Nothing is looked up on a network.

    Args:
        pipeline: an installed spaCy pipeline with named entities; None: the English one that is
            installed, the largest of several.
        kinds: Presidio's entities to find, such as PERSON; None: all that it knows but `LEFT_OUT`.
        analyzer: a `presidio_analyzer.AnalyzerEngine` of one's own, instead of `pipeline`; of
            several languages it reads each text in every one.

    Raises:
        ImportError: there is no Presidio.
        ValueError: no such pipeline, or no such kind.
    """

    name = "pii"

    def __init__(
        self,
        pipeline: str | None = None,
        kinds: Sequence[str] | None = None,
        *,
        analyzer: Any = None,
    ) -> None:
        if analyzer is None:
            pipeline, language = _installed(pipeline)
            analyzer = _analyzer(pipeline, language)
        languages = getattr(analyzer, "supported_languages", None) or ["en"]
        known = {language: analyzer.get_supported_entities(language) for language in languages}
        names = sorted({kind for some in known.values() for kind in some})
        for kind in kinds or ():
            if kind not in names:
                (near,) = difflib.get_close_matches(kind, names, n=1, cutoff=0.0)
                raise ValueError(
                    f"pii: no kind {kind!r}, the nearest is {near!r}; the kinds are: "
                    + ", ".join(names)
                )
        self.kinds = [*kinds] if kinds else [kind for kind in names if kind not in LEFT_OUT]
        self._asked = {
            language: [kind for kind in self.kinds if kind in some]
            for language, some in known.items()
        }
        self._analyzer = analyzer
        pipelines = getattr(getattr(analyzer, "nlp_engine", None), "nlp", None) or {}
        self._longest = min((one.max_length for one in pipelines.values()), default=math.inf)
        self.settings: dict[str, Any] = {
            "pipeline": pipeline,
            "pipeline_version": _version(pipeline),
            "presidio_version": _version("presidio-analyzer"),
            "kinds": self.kinds,
            "least_score": LEAST_SCORE,
        }

    def find(self, examples: Sequence[Example]) -> Iterable[list[Found]]:
        """Yield the spans of each example.

        Raises:
            ValueError: a text that is too long for the spaCy pipeline; names the example.
        """
        for example in examples:  # all of them before the first is read
            longest = max(len(text.content) for text in texts_of(example))
            if longest > self._longest:
                raise ValueError(
                    f"example {example.id!r}: pii: a text of {longest} characters, and the spaCy "
                    f"pipeline takes {self._longest} at most: divide the record"
                )
        for example in examples:
            found = []
            for number, text in enumerate(texts_of(example)):
                for one in self._analyze(text.content):
                    found.append(Found(number, one.start, one.end, one.score, one.entity_type))
            yield found

    def _analyze(self, text: str) -> Iterator[Any]:
        for language, kinds in self._asked.items():
            if kinds:  # Presidio takes none for an error
                yield from self._analyzer.analyze(
                    text=text, language=language, entities=kinds, score_threshold=LEAST_SCORE
                )


def _version(package: str | None) -> str | None:
    try:
        return None if package is None else version(package)
    except PackageNotFoundError:
        return None


def _installed(pipeline: str | None) -> tuple[str, str]:
    """Return the name of an installed pipeline and its language. (Presidio would download one that
    is missing.)"""
    try:
        import presidio_analyzer  # noqa: F401
        from spacy import util
    except ImportError as error:
        raise ImportError(f"pii takes presidio-analyzer ({error}): {_INSTALL}") from error
    there = sorted(util.get_installed_models(), key=_size)
    if pipeline is None:
        english = [name for name in there if name.startswith("en_")]
        if not english:
            raise ValueError(f"pii: no English spaCy pipeline is installed: {_PIPELINE}")
        pipeline = english[0]
    elif pipeline not in there:
        names = ", ".join(there) or "there is none"
        raise ValueError(f"pii: no spaCy pipeline {pipeline!r} is installed, only: {names}")
    return pipeline, pipeline.split("_")[0]


def _size(name: str) -> tuple[int, str]:
    return next((n for n, size in enumerate(_SIZES) if f"_{size}" in name), len(_SIZES)), name


def _analyzer(pipeline: str, language: str) -> Any:
    from presidio_analyzer import AnalyzerEngine, PatternRecognizer
    from presidio_analyzer.nlp_engine import NlpEngineProvider
    from presidio_analyzer.predefined_recognizers import CreditCardRecognizer, EmailRecognizer

    logging.getLogger("presidio-analyzer").setLevel(logging.ERROR)
    models = [{"lang_code": language, "model_name": pipeline}]
    provider = NlpEngineProvider(nlp_configuration={"nlp_engine_name": "spacy", "models": models})
    try:
        engine = provider.create_engine()
        _drop_unfound(engine, language)
        analyzer = AnalyzerEngine(nlp_engine=engine, supported_languages=[language])
    except Exception as error:  # spaCy raises errors of many kinds
        raise ValueError(
            f"pii: the spaCy pipeline {pipeline!r} cannot be loaded, name another with "
            f"--pii-pipeline: {one_line(error)}"
        ) from error
    # Presidio's own recognizer of e-mail looks the domain up in a list that it downloads, and
    # leaves out those of company networks and examples.
    analyzer.registry.remove_recognizer("EmailRecognizer")
    analyzer.registry.add_recognizer(
        PatternRecognizer(
            supported_entity="EMAIL_ADDRESS",
            name="EmailPattern",
            patterns=EmailRecognizer.PATTERNS,
            context=EmailRecognizer.CONTEXT,
            supported_language=language,
        )
    )
    # Presidio has it for four languages; digits and check sum are the same in all.
    if "CREDIT_CARD" not in analyzer.get_supported_entities(language):
        analyzer.registry.add_recognizer(CreditCardRecognizer(supported_language=language))
    return analyzer


def _drop_unfound(engine: Any, language: str) -> None:
    """Drop the kinds that Presidio expects of any spaCy pipeline and this one has no label of, such
    as EMAIL: they would count as known, and nothing would ever be found."""
    pipeline, settings = engine.nlp[language], engine.ner_model_configuration
    kinds = settings.model_to_presidio_entity_mapping
    labels = {label for some in pipeline.pipe_labels.values() for label in some}
    if "ner" in pipeline.pipe_names:  # another finder of names need not tell its labels
        kept = {label: kind for label, kind in kinds.items() if label in labels}
        settings.model_to_presidio_entity_mapping = kept or kinds

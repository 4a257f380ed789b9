"""Judges of statements and documents: is a statement supported, is it relevant, is a document relevant."""

from __future__ import annotations

import asyncio
import re
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field

from harmony_core.config.argument_kinds import checked
from harmony_core.errors import DataError, IgnoreGradeException
from harmony_core.graders.base import FailedJudgeLog, SuccessJudgeLog
from harmony_core.graders.judges import (
    DATA,
    Judge,
    PromptBuildingBlocks,
    blocks,
    said,
    separate_context_from_last_user_turn,
)
from harmony_core.text.threads import StringThread

if TYPE_CHECKING:
    from harmony_core.client import InferenceModel

SupportedLanguages = Literal[
    "am", "ar", "bg", "da", "de", "el", "en", "es", "fa", "fr", "hi", "hy", "it", "ja", "kk", "mr", "my", "nl", "pl",
    "ru", "sk", "ur", "zh",
]  # fmt: skip

_END = re.compile(r"""(?:[.!?…]+|[。！？｡؟۔।॥։።፧፨။]+)(?:["'”’»)\]」』]|[ \u00a0\u202f][»›])*""")
_NEEDS_NO_SPACE = "。！？｡؟۔।॥։።፧፨။"
_ABBREVIATION = re.compile(
    r"mr|mrs|ms|dr|prof|sr|jr|st|vs|etc|no|fig|approx|e\.g|i\.e|cf|inc|ltd|co|z\.b|d\.h|u\.a|bzw|ca|nr|usw|evtl|dhr|mevr|"
    r"bijv|m|mme|mlle|p\.ex|ecc|sig|dott|ud|ej|sra|núm|np|tzn|itd|tj|atď|napr|т\.е|т\.д|г|ул|им|bl\.a|f\.eks",
    re.IGNORECASE,
)
_ORDINALS = ("da", "de", "pl", "sk")  # languages that write "3. May"


def split_sentences(text: str, language: SupportedLanguages = "en") -> list[str]:
    """The sentences of a text, a line at a time.

    A mark of the Chinese, Japanese, Arabic, Indic, Ethiopic, Armenian and Burmese scripts always ends a sentence; so
    does `;` in Greek. A Latin mark does before a space and no small letter, unless it belongs to an abbreviation, to
    an initial, to the number of a line, or to an ordinal in Danish, German, Polish and Slovak.
    """
    marks = re.compile(_END.pattern.replace("…]", "…;;]")) if language == "el" else _END
    found = []
    for line in text.splitlines():
        start = 0
        for mark in marks.finditer(line):
            if _ends(line, mark, line[start : mark.start()].split()[-1:], language):
                found.append(line[start : mark.end()].strip())
                start = mark.end()
        found.append(line[start:].strip())
    return [sentence for sentence in found if re.search(r"\w", sentence)]


def _ends(line: str, mark: re.Match[str], before: list[str], language: str) -> bool:
    after = line[mark.end() :]
    if mark[0][0] in _NEEDS_NO_SPACE or not after.strip():
        return True
    word = before[0].lstrip("(\"'«„“") if before else ""
    if not after[0].isspace() or after.lstrip(" \"'«„“(")[:1].islower():
        return False
    number = word.isdigit() and (language in _ORDINALS or line.lstrip().startswith(f"{word}."))
    initial = len(word) == 1 and word.isupper()
    return mark[0] != "." or not (number or initial or _ABBREVIATION.fullmatch(word))


class SingleStatementFaithfulnessJudgeOutput(BaseModel):
    """Whether one statement is supported."""

    statement_idx: int = Field(description="the number of the statement")
    reasoning: str = Field(description="why, in a few words")
    score: Literal["1", "0"] = Field(description="1 if the context supports the statement, else 0")


class FaithfulnessGraderOutput(BaseModel):
    """One entry for each statement, in order."""

    all_statements_scoring: list[SingleStatementFaithfulnessJudgeOutput] = Field(description="one for each statement")


class StatementRelevancy(BaseModel):
    """Whether one statement is relevant."""

    reason: str = Field(description="why, in a few words")
    score: Literal[0, 1] = Field(description="1 if the statement helps to answer the question, else 0")


class AnswerRelevancyResults(BaseModel):
    """One entry for each statement, in order."""

    results: list[StatementRelevancy] = Field(description="one for each statement")


class DocumentRelevancyResult(BaseModel):
    """Whether one document is relevant."""

    reason: str = Field(description="why, in a sentence")
    score: Literal[0, 1] = Field(description="1 if the document helps to answer the question, else 0")


class _StatementJudge(Judge):
    """What the three judges share: their constructor, and how they ask."""

    def __init__(self, model: InferenceModel, language: SupportedLanguages, key: str, grader_id: str | None) -> None:
        super().__init__(key, model, grader_id=grader_id)
        self.language = language

    def statements(self, sample: StringThread) -> list[str]:
        """The sentences of the completion."""
        return split_sentences(PromptBuildingBlocks.of(sample).last_assistant_turn, self.language)

    def prompt(self, system: str, **texts: str) -> StringThread:
        """The task, and the texts in blocks."""
        return StringThread([("system", f"{system} {DATA}"), ("user", blocks(**texts))])


class FaithfulnessGrader(_StatementJudge):
    """The share of the completion's sentences that what stands before it supports, with `metadata["documents"]`.

    Raises IgnoreGradeException for a completion without a sentence, and if a model outside the engine gives another
    number of scores.
    """

    @checked
    def __init__(
        self,
        model: InferenceModel,
        language: SupportedLanguages = "en",
        grader_key: str = "faithfulness_judge",
        grader_id: str | None = None,
    ) -> None:
        super().__init__(model, language, grader_key, grader_id)

    def add_log(self, log: SuccessJudgeLog | FailedJudgeLog) -> None:
        """As of every grader, with the documented name of the argument."""
        super().add_log(log)

    async def judge(self, sample: StringThread) -> tuple[float, str]:
        """The share of supported sentences, rounded to three decimals, and a reason for each."""
        statements = self.statements(sample)
        if not statements:
            raise IgnoreGradeException("the completion has no sentence")
        context = "\n\n".join([said(sample.get_turns()[:-1]), *_documents(sample)])
        system = (
            "Does the context support each statement? Answer in JSON: "
            '{"all_statements_scoring": [{"statement_idx": number, "reasoning": why, "score": "1" or "0"}, ...]}'
        )
        prompt = self.prompt(system, context=context, statements=_numbered(statements))
        found = (await self.ask(prompt, FaithfulnessGraderOutput, len(statements))).all_statements_scoring
        if len(found) != len(statements):
            raise IgnoreGradeException(f"the judge gave {len(found)} scores for {len(statements)} statements")
        reasons = [f"{each.score}: {text} ({each.reasoning})" for text, each in zip(statements, found, strict=True)]
        return round(fmean(int(each.score) for each in found), 3), "\n".join(reasons)


class AnswerRelevancyGrader(_StatementJudge):
    """The share of the completion's sentences that help to answer the last question; 0 without a sentence."""

    @checked
    def __init__(
        self,
        model: InferenceModel,
        language: SupportedLanguages = "en",
        grader_key: str = "answer_relevancy_judge",
        grader_id: str | None = None,
    ) -> None:
        super().__init__(model, language, grader_key, grader_id)

    async def judge(self, sample: StringThread) -> tuple[float, str]:
        """The share of relevant sentences, and a reason for each."""
        statements, parts = self.statements(sample), PromptBuildingBlocks.of(sample)
        if not statements:
            return 0.0, "the completion has no sentence"
        system = (
            "Does each statement help to answer the question? Answer in JSON: "
            '{"results": [{"reason": why, "score": 1 or 0}, ...]}'
        )
        texts = {"context": parts.context, "question": parts.last_user_turn, "statements": _numbered(statements)}
        found = (await self.ask(self.prompt(system, **texts), AnswerRelevancyResults, len(statements))).results
        reasons = [f"{each.score}: {each.reason}" for each in found]
        return fmean(each.score for each in found) if found else 0.0, "\n".join(reasons)


class ContextRelevancyGrader(_StatementJudge):
    """The share of `metadata["documents"]`, a list of texts, that help to answer the last question.

    Raises DataError for a sample without documents or without a user turn.
    """

    @checked
    def __init__(
        self,
        model: InferenceModel,
        language: SupportedLanguages = "en",
        grader_key: str = "context_relevancy_judge",
        grader_id: str | None = None,
    ) -> None:
        super().__init__(model, language, grader_key, grader_id)

    async def judge(self, sample: StringThread) -> tuple[float, str]:
        """The share of relevant documents, each in a request of its own, and a reason for each."""
        documents, (_, question) = _documents(sample), separate_context_from_last_user_turn(sample)
        if not documents or question is None:
            raise DataError("a sample for context relevancy has a user turn, and texts in metadata['documents']")
        system = 'Does the document help to answer the question? Answer in JSON: {"reason": why, "score": 1 or 0}'
        prompts = [self.prompt(system, question=question, document=document) for document in documents]
        found = await asyncio.gather(*(self.ask(prompt, DocumentRelevancyResult) for prompt in prompts))
        return fmean(each.score for each in found), "\n".join(f"{each.score}: {each.reason}" for each in found)


def _documents(sample: StringThread) -> list[str]:
    found = sample.metadata.get("documents") if isinstance(sample.metadata, dict) else None
    return [str(document) for document in found] if isinstance(found, list) else []


def _numbered(texts: list[str]) -> str:
    return "\n".join(f"{index}. {text}" for index, text in enumerate(texts))

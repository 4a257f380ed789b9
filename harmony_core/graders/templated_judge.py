"""A judge whose prompts are the user's own templates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pydantic import BaseModel

from harmony_core.config.argument_kinds import checked
from harmony_core.errors import UndescribedField
from harmony_core.graders.binary_judge import BaseTemplatedPromptJudgeOutput
from harmony_core.graders.judges import Judge, said, separate_context_from_last_user_turn
from harmony_core.graders.templates import render
from harmony_core.structured_output import remove_reasoning, render_schema
from harmony_core.text.threads import StringThread

if TYPE_CHECKING:
    from harmony_core.client import InferenceModel

OutputT = TypeVar("OutputT", bound=BaseTemplatedPromptJudgeOutput)


class TemplatedPromptJudgeGrader(Judge, Generic[OutputT]):
    """Asks with two Handlebars templates (`graders/templates.py`) and reads the score from `output_model`.

    Raises UsageError for a template that cannot be read.
    """

    @checked
    def __init__(
        self,
        grader_key: str,
        model: InferenceModel,
        system_template: str | None,
        user_template: str,
        output_model: type[OutputT],
        template_variables: dict[str, Any] | None = None,
        temperature: float = 0.0,
        grader_id: str | None = None,
    ) -> None:
        super().__init__(grader_key, model, temperature, grader_id)
        self._templates = [*((("system", system_template),) if system_template else ()), ("user", user_template)]
        self.output_model, self.template_variables = output_model, template_variables
        for _, template in self._templates:
            render(template, {})  # raises for what cannot be read

    @classmethod
    def extract_template_context(
        cls, thread: StringThread, output_model: type[BaseModel], template_variables: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """What templates can read: the thread in several forms, the output's form, and `template_variables`."""
        turns = thread.get_turns()
        try:
            schema = render_schema(output_model)
        except UndescribedField:
            schema = render_schema(output_model, with_field_descriptions=False)
        before, question = separate_context_from_last_user_turn(thread, include_system_prompt=True)
        return {
            "metadata": thread.metadata,
            "turns": [turn._asdict() for turn in turns],
            "context_turns": [turn._asdict() for turn in turns[:-1]],
            "context_str": said(turns[:-1]),
            "context_turns_without_last_user": [turn._asdict() for turn in before],
            "context_str_without_last_user": said(before),
            "last_user_turn_content": question,
            "completion": remove_reasoning(thread.completion() or ""),
            "output_schema": schema,
            **(template_variables or {}),
        }

    @classmethod
    def render_template(cls, template: str, thread: StringThread, output_model: type[BaseModel]) -> str:
        """A template with a thread's variables, to look at it."""
        return render(template, cls.extract_template_context(thread, output_model))

    async def judge(self, sample: StringThread) -> tuple[float, str]:
        """The output's score and reason."""
        context = self.extract_template_context(sample, self.output_model, self.template_variables)
        prompt = StringThread([(role, render(template, context)) for role, template in self._templates])
        verdict = await self.ask(prompt, self.output_model)
        return verdict.get_score(), verdict.get_reasoning() or ""

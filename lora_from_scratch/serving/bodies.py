"""What a client may ask for: the JSON bodies that the server takes.

Fields and their defaults are OpenAI's. Whatever would change the answer and
cannot be honored is refused; nothing is silently ignored.
Source: OpenAI API reference, "Create completion", "Create chat completion".
Taught in: notebooks/15_serving.ipynb
"""

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

MAX_CHOICES = 32  # prompts x n, rows that one request may ask for
# Change nothing about the answer, so any value is taken.
HARMLESS = {
    "metadata",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Not honored, so taken only at the value that changes nothing.
NEUTRAL = {
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "suffix": "",
    "tool_choice": "none",
    "tools": [],
    "top_logprobs": 0,
}


def _unicode(text: str) -> str:
    text.encode()  # JSON can spell half a character: "\ud800"
    return text


Text = Annotated[str, AfterValidator(_unicode)]


def _changes_nothing(key, value):
    if key in HARMLESS or value is None:
        return True
    if key not in NEUTRAL or isinstance(value, bool) != (NEUTRAL[key] is False):
        return False
    return value == NEUTRAL[key]


class Body(BaseModel):
    """A JSON object of known keys and exact types; null is the default."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop(cls, body):
        if not isinstance(body, dict):
            return body
        return {k: v for k, v in body.items() if not _changes_nothing(k, v)}


class StreamOptions(Body):
    """``include_usage``: one more event at the end, with the counts."""

    include_usage: bool = False


class Sampling(Body):
    """What completions and chat completions have in common."""

    model: Text
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[Annotated[Text, Field(min_length=1)]] = Field([], max_length=4)
    max_tokens: int | None = Field(None, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, stop):
        return [stop] if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _usage_only_in_streams(self):
        if self.stream_options and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self


class CompletionBody(Sampling):
    """``prompt``: a text, token ids, or a list of either."""

    prompt: list[str | list[int]]
    max_tokens: int = Field(16, ge=1)

    @field_validator("prompt", mode="plain")
    @classmethod
    def _prompts(cls, prompt):
        if isinstance(prompt, str) or _are_ids(prompt):
            prompt = [prompt]
        if not isinstance(prompt, list) or not all(
            isinstance(p, str) or _are_ids(p) for p in prompt
        ):
            raise ValueError("must be a text, token ids, or a list of either")
        for text in prompt:
            if isinstance(text, str):
                _unicode(text)
        return prompt

    @model_validator(mode="after")
    def _not_too_many(self):
        rows = len(self.prompt) * self.n
        if not 1 <= rows <= MAX_CHOICES:
            raise ValueError(
                f"{len(self.prompt)} prompts with n={self.n} are {rows} "
                f"choices; 1 to {MAX_CHOICES} are allowed"
            )
        return self


def _are_ids(prompt):
    return (
        isinstance(prompt, list)
        and len(prompt) > 0
        and all(type(i) is int for i in prompt)
    )


class TextPart(Body):
    """A part of a message; other types (images, audio) are refused."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)]


class ChatBody(Sampling):
    """``messages``: the conversation so far, for the model's template."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_limit(self):
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) == 2:
            raise ValueError("max_tokens and max_completion_tokens differ")
        self.max_tokens = max(both, default=None)
        return self

    def plain_messages(self) -> list[dict[str, str]]:
        """Return the messages as chat templates want them: texts only."""
        return [
            {
                "role": m.role,
                "content": m.content
                if isinstance(m.content, str)
                else "".join(part.text for part in m.content),
            }
            for m in self.messages
        ]


class LoadBody(Body):
    """vLLM's names. The path is taken relative to the adapter root."""

    lora_name: Text
    lora_path: Text


class UnloadBody(Body):
    """vLLM's name."""

    lora_name: Text

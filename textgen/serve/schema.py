"""The bodies that OpenAI's clients send, and those that they read."""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from textgen.generate import Sampling

REFUSED = (
    "tools",
    "functions",
    "response_format",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "presence_penalty",
    "frequency_penalty",
    "echo",
    "suffix",
    "best_of",
    "audio",
    "modalities",
)
"""Fields that would change the reply and are not served. Unknown others change nothing."""

_HARMLESS: tuple[Any, ...] = (None, 0, False, [], {}, ["text"], {"type": "text"})


class StreamOptions(BaseModel):
    """How a streamed reply is told."""

    include_usage: bool = False


class Asked(BaseModel):
    """What both kinds of request have in common."""

    model_config = ConfigDict(extra="allow")

    model: str = ""
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=0.8, ge=0.0, le=10.0, allow_inf_nan=False)
    top_p: float = Field(default=0.95, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    n: Literal[1] = 1
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    stop: list[str] = Field(default_factory=list, max_length=4)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @field_validator("n", "temperature", "top_p", "top_k", "stream", mode="before")
    @classmethod
    def _unset(cls, value: Any, info: Any) -> Any:
        """A null is as good as nothing: clients send it."""
        return cls.model_fields[info.field_name].default if value is None else value

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value or []

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, value: list[str]) -> list[str]:
        if any(not 0 < len(text) <= 200 for text in value):
            raise ValueError("each stop must have 1 to 200 characters")
        return value

    @model_validator(mode="after")
    def _served_here(self) -> Asked:
        for name, value in (self.model_extra or {}).items():
            if (
                name in REFUSED
                and value not in _HARMLESS
                and not (name == "best_of" and value == 1)
            ):
                raise ValueError(f"{name} is not served; leave it out")
        return self

    def sampling(self, usual: int, most: int) -> Sampling:
        """How tokens are chosen; a reply has `usual` of them, or what was asked up to `most`."""
        asked = self.max_completion_tokens or self.max_tokens or usual
        return Sampling(self.temperature, self.top_p, min(asked, most), self.seed)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class Completion(Asked):
    """Body of /v1/completions."""

    prompt: str

    @field_validator("prompt", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return value[0] if isinstance(value, list) and len(value) == 1 else value


class Part(BaseModel):
    """A piece of a message; text is all that is read here."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        if isinstance(value, list):
            return "".join(Part.model_validate(part).text for part in value)
        return value


class Chat(Asked):
    """Body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=1000)

    def turns(self) -> list[dict[str, str]]:
        """Messages as templates want them."""
        return [
            {"role": m.role.replace("developer", "system"), "content": m.content}
            for m in self.messages
        ]


class Answer:
    """Bodies of one reply, whole or in pieces.

    Args:
        is_chat: whether the conversation's shape is asked for.
        model: name that the client sees.
        version: of the weights.
    """

    def __init__(self, is_chat: bool, model: str, version: str) -> None:
        self._is_chat = is_chat
        kind = "chat.completion" if is_chat else "text_completion"
        self._chunk_kind = "chat.completion.chunk" if is_chat else kind
        self._head: dict[str, Any] = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": version,
        }

    def whole(self, text: str, reason: str, usage: dict[str, Any]) -> dict[str, Any]:
        """The reply in one body."""
        said: dict[str, Any] = {"text": text}
        if self._is_chat:
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        return {**self._head, "choices": [choice], "usage": usage}

    def piece(self, text: str, reason: str | None = None, *, first: bool = False) -> dict[str, Any]:
        """A part of a streamed reply."""
        said: dict[str, Any] = {"text": text}
        if self._is_chat:
            delta: dict[str, Any] = {"role": "assistant"} if first else {}
            said = {"delta": delta | ({"content": text} if text or first else {})}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        return {**self._head, "object": self._chunk_kind, "choices": [choice]}

    def counts(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last part, if it was asked for."""
        return {**self._head, "object": self._chunk_kind, "choices": [], "usage": usage}


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}

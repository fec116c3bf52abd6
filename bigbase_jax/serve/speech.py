"""OpenAI's API for models that transcribe and models that speak: /v1/audio/transcriptions, /v1/audio/speech.

https://platform.openai.com/docs/api-reference/audio. A model transcribes where its task says so (``transcribes``), and
speaks where what it renders is sound (``rendered``); nothing else is known of it here. What is asked beside the file or
the text is an entry of the row that its codec reads (``Fields.options``), and refused where there is no such entry.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field
from starlette.responses import PlainTextResponse

from bigbase_jax.audio.files import encoded, length
from bigbase_jax.core import UserError
from bigbase_jax.serve.guard import as_json
from bigbase_jax.serve.models import Models
from bigbase_jax.serve.refused import Refused
from bigbase_jax.serve.requests import body_json, body_of, checked, form_of, using, within
from bigbase_jax.serve.served import Given, Served

_PCM_RATE = 24_000  # samples per second that OpenAI's clients take raw samples to have
_LINE, _SHOWN, _PAUSE = 42, 6.0, 0.8  # a subtitle that is made of words: characters, seconds, and those between two
_FILE = {"type": "string", "format": "binary"}


class Transcribing(BaseModel):
    """The fields of a form to /v1/audio/transcriptions, beside the file."""

    model: str
    language: str | None = Field(None, max_length=40)
    prompt: str | None = Field(None, max_length=10_000)
    temperature: float | None = Field(None, ge=0, le=1)
    response_format: Literal["json", "text", "srt", "vtt", "verbose_json"] = "json"
    timestamp_granularities: list[Literal["word", "segment"]] = []
    stream: Literal[False, "false", "False"] = False


class Speaking(BaseModel):
    """A request to /v1/audio/speech; ``pitch``, in semitones, is ours."""

    model: str
    input: str = Field(min_length=1, max_length=4096)
    voice: str | None = Field(None, max_length=80)
    speed: float = Field(1.0, ge=0.25, le=4)
    pitch: float = Field(0.0, ge=-24, le=24)
    response_format: Literal["mp3", "wav", "flac", "opus", "pcm"] = "mp3"
    instructions: Literal[None, ""] = None
    stream_format: Literal["audio"] = "audio"


def router(models: Models, most: float) -> APIRouter:
    """The API's routes; ``most``: seconds of a recording."""
    found = APIRouter(prefix="/v1/audio", tags=["OpenAI"])

    @found.post("/transcriptions", openapi_extra=body_of(Transcribing, "multipart/form-data", file=_FILE))
    async def transcriptions(request: Request) -> Response:
        """The text of a recording, with its times where the model has them."""
        data, asked = await _form(request)
        with using(models, asked.model, request) as served:
            if not served.transcribes:
                raise Refused(404, f"{asked.model!r} does not transcribe; GET /v1/models says what each model does.")
            said = await within(request, _refused_as_400(_heard(served, data, asked, most)))
        return _transcript(said, asked)

    @found.post("/speech", openapi_extra=body_of(Speaking))
    async def speech(request: Request) -> Response:
        """A text, spoken."""
        asked = checked(Speaking, await body_json(request))
        with using(models, asked.model, request) as served:
            if not served.predictor.renders:
                raise Refused(404, f"{asked.model!r} does not speak; GET /v1/models says what each model does.")
            data, media_type = await within(request, _refused_as_400(_spoken(served, asked)))
        return Response(data, media_type=media_type)

    return found


async def _refused_as_400(answer: Any) -> Any:
    """As OpenAI has it, for what this server calls 422."""
    try:
        return await answer
    except Refused as error:
        raise Refused(400 if error.status == 422 else error.status, error.sentence, error.retry_after) from error
    except UserError as error:
        raise Refused(400, str(error)) from error


def _row(served: Served, first: bytes | str, **options: Any) -> Given:
    """What a codec reads: the file or the text, and options that are not None; a language is a hint, and may go."""
    fields = served.predictor.reading.codec.fields
    known = fields.options if fields else ()
    options = {name: value for name, value in options.items() if value is not None}
    options = {name: value for name, value in options.items() if name in known or name != "language"}
    if others := [name for name in options if name not in known]:
        raise Refused(400, f"{served.name!r} takes no {_NAMES.get(others[0], others[0])}; leave it out.")
    if fields is None or not (options or isinstance(first, str)):
        return first if isinstance(first, bytes) else {"text": first}
    return {next(iter(fields.columns), "text"): first, **options}


_NAMES = {"speaker": "voice", "rate": "speed"}


# ------------------------------------------------------------------------------------------------------ hearing


async def _form(request: Request) -> tuple[bytes, Transcribing]:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise Refused(
            400, "send a form (multipart/form-data) with the recording as its file and the name of the model."
        )
    data, fields = None, dict[str, Any]()
    for name, value in await form_of(request, 1, 32):
        if isinstance(value, bytes) and name == "file":
            data = value
        elif isinstance(value, str) and name.endswith("[]"):
            fields.setdefault(name[:-2], []).append(value)
        else:
            fields[name] = value
    if granularities := fields.get("timestamp_granularities"):
        fields["timestamp_granularities"] = [granularities] if isinstance(granularities, str) else granularities
    asked = checked(Transcribing, {name: value for name, value in fields.items() if value != ""})
    if not data:
        raise Refused(400, "the form has no file, or an empty one; a recording is its field 'file'.")
    if asked.timestamp_granularities and asked.response_format != "verbose_json":
        raise Refused(400, "timestamp_granularities takes response_format=verbose_json.")
    return data, asked


async def _heard(served: Served, data: bytes, asked: Transcribing, most: float) -> dict[str, Any]:
    if (seconds := await asyncio.to_thread(length, data)) > most:
        raise Refused(400, f"the recording has {seconds:,.1f} seconds; at most {most:,g} are transcribed at once.")
    given = _row(served, data, language=asked.language, prompt=asked.prompt, temperature=asked.temperature)
    answers = await served.predict(given)
    return answers[0] if len(answers) == 1 else {"text": " ".join(str(part["text"]) for part in answers)}


def _transcript(said: Mapping[str, Any], asked: Transcribing) -> Response:
    """The answer in the form that was asked for."""
    kind, text = asked.response_format, str(said["text"])
    if kind == "text":
        return PlainTextResponse(text + "\n")
    length = said.get("duration")
    usage = {} if length is None else {"usage": {"type": "duration", "seconds": length}}
    if kind == "json":
        return as_json({"text": text, **usage})
    segments = list(_segments(said))
    if kind in ("srt", "vtt"):
        if not segments and text:
            raise Refused(400, f"{asked.model!r} gives no times; response_format=text is what it can.")
        return PlainTextResponse(_subtitles(segments, kind))
    parts: dict[str, Any] = {}
    if "word" in asked.timestamp_granularities:
        if "words" not in said:
            raise Refused(400, f"{asked.model!r} gives no times of words.")
        parts["words"] = said["words"]
    if "segment" in asked.timestamp_granularities or not asked.timestamp_granularities:
        parts["segments"] = [{"id": i, **segment} for i, segment in enumerate(segments)]
    found = {"task": "transcribe", "language": said.get("language", asked.language), "duration": length, "text": text}
    return as_json({**found, **parts, **usage})


def _segments(said: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Those of the model; or else its words, as many as one reads at once; or else all of the recording."""
    words: Sequence[Mapping[str, Any]] = said.get("words") or ()
    if said.get("segments"):
        yield from said["segments"]
    elif words:
        start = 0
        for i, word in enumerate(words):
            line = " ".join(str(w["word"]) for w in words[start : i + 1])
            after = words[i + 1] if i + 1 < len(words) else None
            if (
                after is None
                or after["start"] - word["end"] > _PAUSE
                or after["end"] - words[start]["start"] > _SHOWN
                or len(line) + len(str(after["word"])) >= _LINE
            ):
                yield {"start": words[start]["start"], "end": word["end"], "text": line}
                start = i + 1
    elif said["text"] and said.get("duration") is not None:
        yield {"start": 0.0, "end": said["duration"], "text": said["text"]}


def _subtitles(segments: Sequence[Mapping[str, Any]], kind: str) -> str:
    """SubRip, or WebVTT (W3C), of which a text may not end a block or look like its times."""
    blocks = ["WEBVTT"] if kind == "vtt" else []
    for number, segment in enumerate(segments, 1):
        text = " ".join(str(segment["text"]).split()).replace("-->", "→")
        if kind == "vtt":
            text = text.replace("&", "&amp;").replace("<", "&lt;")
        times = " --> ".join(_clock(segment[end], "." if kind == "vtt" else ",") for end in ("start", "end"))
        blocks.append(f"{number}\n{times}\n{text}" if kind == "srt" else f"{times}\n{text}")
    return "\n\n".join(blocks) + "\n"


def _clock(seconds: float, point: str) -> str:
    whole, ms = divmod(round(1000 * max(seconds, 0.0)), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{point}{ms:03}"


# ------------------------------------------------------------------------------------------------------ speaking


async def _spoken(served: Served, asked: Speaking) -> tuple[bytes, str]:
    other = {"rate": None if asked.speed == 1 else asked.speed, "pitch": asked.pitch or None}
    made = await served.render(_row(served, asked.input, speaker=_speaker(served, asked.voice), **other))
    if not made or not all(part.media_type.startswith("audio/") for part in made):
        raise Refused(404, f"{served.name!r} makes no sound; POST /v1/predict/{served.name} answers inputs.")
    kind = asked.response_format
    return await asyncio.to_thread(encoded, [part.data for part in made], kind, _PCM_RATE if kind == "pcm" else None)


def _speaker(served: Served, voice: str | None) -> str | None:
    """One that the model knows; "default" is none in particular, since OpenAI's clients have to name one."""
    if voice in (None, "default"):
        return None
    voices = served.card["voices"]
    if voice in voices:
        return voice
    known = ", ".join(voices[:20]) or "'default' alone"
    raise Refused(400, f"{served.name!r} has no voice {voice!r}; it has {known}.")

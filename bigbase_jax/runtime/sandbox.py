"""The process in which what came in a folder is computed: chat templates, and the first try of a tokenizer.

``untrusted.ask`` starts it. The operating system limits its memory and its time, so that what never ends, or takes all
memory, ends this process and no other. It imports nothing of ours, and so begins in a tenth of a second.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import signal
import sys
from typing import Any

OPEN, CLOSE = "\ufdd2", "\ufdd3"  # around what the assistant says; Unicode has given these characters to nobody
_MOST_TEXT = 1 << 24  # characters that are given back
_TRIED = (
    "The quick brown fox jumps over 13 lazy dogs; it's 3.5 e-mails, isn't it?\n\n\t<b>naïve</b> 明月几时有？\u3000🦊 ",
    *(f"{c * 64}!{c}" for c in "aA1 .\n_-é明\u3000🦊"),
    "ab" * 64 + "!",
)


def render(template: str, words: dict[str, Any]) -> str:
    """The text of a chat template."""
    text = _compiled(template).render(**words)
    if len(text) > _MOST_TEXT:
        raise MemoryError
    text.encode()  # half of a surrogate pair is no text
    return text


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """``{% generation %}``: signs around what stands in it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_signs"), [], [], body).set_lineno(line)

        def _signs(self, caller: Any) -> str:
            return f"{OPEN}{caller()}{CLOSE}"

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


def try_tokenizer(content: str) -> None:
    """Uses a ``tokenizer.json`` once in each way in which it will be used."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(content)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for encoding in tokenizer.encode_batch(list(_TRIED), add_special_tokens=False):
        tokenizer.decode(encoding.ids[:256], skip_special_tokens=False)
    first, second = (tokenizer.encode("0", add_special_tokens=False) for _ in range(2))
    tokenizer.post_process(first, add_special_tokens=True)
    tokenizer.post_process(first, second, add_special_tokens=True)


def _serve(memory: int) -> None:
    """Answers lines of JSON, ``[function, seconds, arguments]``, with ``{"found"}`` or ``{"kind", "error"}``."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a package prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a terminal sends to all; without us there are no more lines
    with contextlib.suppress(ValueError, OSError):  # a lower limit stands already, or the system (macOS) has none
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    work: dict[str, Any] = {"render": render, "try_tokenizer": try_tokenizer}
    for line in sys.stdin:
        name, seconds, arguments = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # of computing; then the system ends the process
        try:
            answer = {"found": work[name](**arguments)}
        except BaseException as error:  # templates raise what they like; Rust's PanicException is no Exception
            answer = {"kind": type(error).__name__, "error": str(error)[:1000]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))

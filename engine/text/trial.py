"""A `tokenizer.json` is tried in a process with limits before this one reads it: what is wrong with it would end the
process that uses it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import tokenizers

from engine.platform.jsonfiles import read_bytes
from engine.platform.limited import LimitedProcess, LimitPassed
from stoker.contract.shown import cut
from stoker.errors import InvalidRequest, ModelError

#: Of computing; a vocabulary of 250,000 tokens takes two.
SECONDS = 30.0
#: Address space, on Linux: such a vocabulary takes an eighth of it.
MEMORY = 4 << 30
#: The largest that are known have 35 MB.
MAX_BYTES = 256 << 20
#: What the package raises where its Rust code gives up; it is no `Exception`, and has no name that could be imported.
_PANIC = "PanicException"


class Trials:
    """`process` tries files, each content once: a model that comes again waits for no further trial."""

    def __init__(self, process: LimitedProcess) -> None:
        self.process = process
        #: Digests of files that are right.
        self._passed: set[bytes] = set()

    def refusal(self, path: Path, content: bytes) -> str:
        """Why the file, which has this content, is not used; "" where it is right."""
        digest = sha256(content).digest()
        if digest in self._passed:
            return ""
        try:
            refused = self.process.ask({"path": str(path)}, SECONDS)["refused"]
        except LimitPassed:
            return (
                f"to try it takes more than {SECONDS:g} s or {MEMORY >> 30} GB: "
                "what it makes of a text has no end in sight"
            )
        if not refused:
            self._passed.add(digest)
        return refused


_trials = Trials(
    LimitedProcess(Path(__file__).with_name("tokenizer_process.py"), "tries tokenizers", "computing", memory=MEMORY)
)


def read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a file. Raises `ModelError` for one that is missing, damaged, or takes too much."""
    if not path.exists():
        raise ModelError(
            f"{path.parent}: no tokenizer.json. Write one with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    content = read_bytes(path, MAX_BYTES)
    if refused := _trials.refusal(path, content):
        raise ModelError(f"{path}: {refused}")
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the package raises plain Exception
        raise ModelError(f"{path}: {cut(error)}") from error


def end() -> None:
    """Give the process's memory back; another call starts one again."""
    _trials.process.end()


@contextmanager
def no_panic() -> Iterator[None]:
    """What the package cannot do with a text is that text's error: `InvalidRequest`."""
    try:
        yield
    except BaseException as error:
        # The package raises plain Exception, as for an unknown character of a vocabulary that has no token for it.
        if type(error) is not Exception and type(error).__name__ != _PANIC:
            raise
        raise InvalidRequest(f"the model's tokenizer fails on the text: {str(error)[:200]}") from None

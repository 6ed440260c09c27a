"""Errors that are the user's to mend: each says what is wrong, where, and what to do. A bug is any other exception."""


class LineageError(Exception):
    """Base of all errors whose cause lies in the user's input or environment; the command line exits with 2."""


class FileError(LineageError):
    """A file that cannot be read as what it claims to be, or cannot be written."""

    def __init__(self, path, problem: str, advice: str = ""):
        super().__init__(f"{path}: {problem}" + (f" {advice}" if advice else ""))
        self.path = path


class ShapeMismatch(LineageError):
    """The same parameter has another shape in another model."""

    def __init__(self, name: str, base, tuned):
        super().__init__(
            f"{name}: {tuple(tuned)} in the tuned model, {tuple(base)} in the base. "
            "Not the same architecture? `lineage inspect` shows both."
        )


class MissingExtra(LineageError):
    """An optional package is needed."""

    def __init__(self, verb: str, extra: str, module: str):
        super().__init__(f"`lineage {verb}` needs {module}: pip install 'model-lineage[{extra}]'")

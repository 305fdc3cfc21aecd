"""The exception tree, and nothing else.

    LmgraphError             everything that lmgraph raises on purpose: a code, a sentence, a hint
    ├── UserError            the operator's fault: input, files, configuration
    │   ├── GraphError       graph.yaml has problems (all of them, with line numbers)
    │   ├── SettingsError    an environment variable cannot be used
    │   ├── DataError        a data file cannot be used (line named)
    │   ├── QueryError       a query that cannot be answered (empty, not text)
    │   ├── RequestError     a request over the wire that a door does not accept
    │   └── MissingExtra     an optional dependency is not installed
    ├── AssetError           weights: not found, wrong digest, no space, no source answered
    │   └── AdapterError     a node's adapter: not found, or none
    ├── MasterError          the master's fault
    │   ├── VocabularyMismatch   the bundle and the graph (or the weights) do not belong together
    │   └── NoDecision           the master gave nothing that can be read as a decision
    └── OutsideError         somebody else's fault
        ├── EngineError      llama.cpp refused or failed
        ├── WorkerError      a worker answered with an error or could not be reached
        │   └── WorkerStarting   a worker that is at zero replicas did not come in time
        ├── WorkerTimeout    a worker did not answer in time
        └── StoreError       the store (SQLite, Redis) failed or holds what lmgraph cannot use

A message says what was found and what was expected; `hint` says the next command to run.
"""

from __future__ import annotations


class LmgraphError(Exception):
    """Base of all. `code` is stable and machine-readable; `hint` is the next thing to do, or ''."""

    code = "error"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UserError(LmgraphError):
    """What the operator gave cannot be used."""

    code = "invalid_request"


class GraphError(UserError):
    """graph.yaml has problems; `problems` lists every one."""

    code = "invalid_graph"

    def __init__(self, message: str, hint: str = "", problems: tuple[str, ...] = ()) -> None:
        super().__init__(message, hint)
        self.problems = problems


class SettingsError(UserError):
    """An environment variable or option has a value that cannot be used."""

    code = "invalid_settings"


class DataError(UserError):
    """A data file cannot be read as what it should be."""

    code = "invalid_data"


class QueryError(UserError):
    """A query that cannot be answered."""

    code = "invalid_query"


class RequestError(UserError):
    """A request over the wire that a door does not accept: `param` is the field, `status` the HTTP status.

    `retry_after_s`: seconds after which the same request may do better (429).
    """

    code = "bad_request"

    def __init__(
        self, message: str, hint: str = "", *, param: str | None = None, code: str = "", status: int = 400, retry_after_s: float = 1.0
    ) -> None:
        super().__init__(message, hint)
        self.param, self.status, self.retry_after_s = param, status, retry_after_s
        self.code = code or self.code


class MissingExtra(UserError):
    """An optional dependency is needed and not installed: an `extra` of lmgraph, or a `package` that is in none."""

    code = "missing_extra"

    def __init__(self, what: str, extra: str = "", *, package: str = "") -> None:
        needed, install = (package, package) if package else ("an optional part of lmgraph", f"'lmgraph[{extra}]'")
        super().__init__(f"{what} needs {needed}, which is not installed.", f"Install it: pip install {install}")


class AssetError(LmgraphError):
    """Weights cannot be had, or are not what they should be."""

    code = "asset_error"


class AdapterError(AssetError):
    """The adapter of a node cannot be had, or is none."""

    code = "adapter_error"


class MasterError(LmgraphError):
    """The master cannot do its work."""

    code = "master_error"


class VocabularyMismatch(MasterError):
    """Bundle, weights and graph do not belong together."""

    code = "vocabulary_mismatch"


class NoDecision(MasterError):
    """The master's output holds no decision."""

    code = "no_decision"


class OutsideError(LmgraphError):
    """Something that lmgraph calls has failed. `too_long`: the text had no room in the model; a shorter one may have."""

    code = "outside_error"
    again = True
    """whether the same call may do better a moment later"""

    def __init__(self, message: str, hint: str = "", *, too_long: bool = False) -> None:
        super().__init__(message, hint)
        self.too_long = too_long


class EngineError(OutsideError):
    """llama.cpp refused a request or failed."""

    code = "engine_error"
    again = False


class WorkerError(OutsideError):
    """A worker could not be reached or answered with an error."""

    code = "worker_error"


class WorkerStarting(WorkerError):
    """A worker's server was not there and did not come within its `start_timeout_s`; the same request may do better a little later."""

    code = "worker_starting"
    again = False  # it was waited for
    retry_after_s = 30.0
    """seconds: how long a server with its weights at hand takes to start"""


class WorkerTimeout(OutsideError):
    """A worker did not answer in time."""

    code = "worker_timeout"
    again = False


class StoreError(OutsideError):
    """The store cannot be reached, is full, or holds something that lmgraph did not write."""

    code = "store_error"

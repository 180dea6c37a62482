"""The backend that a session sees where ranks share its stream: it lives on the first rank and leads the others."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.runtime.backends.base import Backend, State
from longtake.runtime.parallel.processes import Followers, is_silence
from longtake.runtime.parallel.rank import Rank
from longtake.runtime.parallel.sent import Sent
from longtake.runtime.report import conv_counts

CLOSE_S = 2.0
RESUME = "go on from the session that was saved last (--load-session), with as many GPUs or with one"


class ShardedState(State):
    """The first rank's part of a state, `own`, and the way to the others'."""

    def __init__(self, own: State, backend: ShardedBackend, network: str, number: int) -> None:
        self.own, self.backend, self.network, self.number = own, backend, network, number

    @property
    def tensors(self) -> dict[str, Tensor]:  # type: ignore[override]
        """See State."""
        return self.own.tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See State.shapes."""
        return self.backend.own.whole_shapes(self.network)

    def whole(self) -> dict[str, Tensor]:
        """See State.whole: gathered, so copies where ranks have parts."""
        with self.backend.command({"do": "whole", "state": self.number}):
            return self.backend.own.whole(self.network, self.own)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See State.load: every rank takes its part."""
        with self.backend.command({"do": "load", "state": self.number}):
            self.backend.own.load(self.network, self.own, tensors)


class ShardedBackend(Backend):
    """`own`, the first rank's part, and the processes of the others. Threads take turns, one network each."""

    name = "sharded"

    def __init__(self, own: Rank, followers: Followers, reason: str) -> None:
        self.own, self.followers, self.reason = own, followers, reason
        self.device, self.preset, self.recipe, self.checkpoints = own.device, own.preset, own.recipe, own.checkpoints
        self.weights, self.made_of, self.vae_conv = own.inner.weights, own.inner.made_of, conv_counts(own.inner)
        self._turn = threading.Lock()
        self._sent, self._states = Sent(), itertools.count()
        self._forgotten: list[int] = []  # states that nobody uses: told with the next command
        self._closed = False

    def has(self, network: str) -> bool:
        """See Backend.has."""
        return self.own.has(network)

    def new_state(self, network: str) -> State:
        """See Backend.new_state."""
        if network not in self.own.shared:
            return self.own.new_state(network)
        number = next(self._states)
        with self.command({"do": "new_state", "network": network, "state": number}):
            state = ShardedState(self.own.new_state(network), self, network, number)
        weakref.finalize(state, self._forgotten.append, number)
        return state

    def run(
        self, network: str, inputs: Mapping[str, Tensor], state: State | None = None, commit: bool = True
    ) -> Mapping[str, Tensor]:
        """See Backend.run."""
        if network not in self.own.shared:
            return self.own.run(network, inputs, state, commit)
        with self._taken():
            told, sent = self._sent.described(inputs, self.specs[network].inputs[0].name)
            number, held = (state.number, state.own) if isinstance(state, ShardedState) else (None, state)
            about = {"do": "run", "network": network, "state": number, "commit": commit, "inputs": told}
            with self._told(about):
                for tensor in sent:
                    self.own.comm.send_all(tensor.to(self.device).contiguous())
                outputs = self.own.run(network, inputs, held, commit)
                self.own.comm.settle()
            if network == "context":  # every rank made it for itself
                kept = {name: self._sent.add(tensor) for name, tensor in outputs.items()}
                with self._told({"do": "keep", "tensors": kept}):
                    pass
            return outputs

    def pass_ms(self) -> dict[str, float]:
        """Milliseconds of a clean pass on the first rank by kind of step, exchanges among them, launched one by one by all
        ranks alike; {} where a pass does not consist of steps."""
        with self.command({"do": "pass_ms"}):
            return self.own.pass_ms()

    @contextmanager
    def command(self, about: dict[str, Any]) -> Iterator[None]:
        """The others do what `about` tells, while this rank does it inside."""
        with self._taken(), self._told(about), torch.no_grad():
            yield
            self.own.comm.settle()

    @contextmanager
    def _taken(self) -> Iterator[None]:
        """Be the only thread that tells the others something: theirs is one order."""
        with self._turn:
            if self._closed:
                raise LongtakeError("the ranks are closed", got="a call for a network", fix="open the engines again")
            if self.failure:
                raise self._lost(str(self.failure.got))
            yield

    @contextmanager
    def _told(self, about: dict[str, Any]) -> Iterator[None]:
        forgotten = [self._forgotten.pop() for _ in range(len(self._forgotten))]  # the collector may add meanwhile
        try:
            self.followers.tell({**about, "drop": self._sent.dropped(), "forget": forgotten})
            yield
        except BaseException as error:
            # Half-way through an exchange nobody knows who has had what: the ranks are of no use any more.
            self.failure = self._lost(self._reason(error))
            self.followers.end()
            self.own.release()
            self.own.comm.leave(broken=True)
            if isinstance(error, Exception):
                raise self.failure from error
            raise

    def _reason(self, error: BaseException) -> str:
        """What one rank did that ended; else, of an exchange that failed, who has not answered; else the error here."""
        words = f"{type(error).__name__}: {error}"
        if not is_silence(words):
            return words.splitlines()[0][:300]
        if ended := self.followers.why():
            return ended
        silent = self.followers.silent()
        known = f"no answer of rank {', '.join(map(str, silent)) or '1'} within {self.own.comm.patience:g} s"
        return f"{known} ({words.splitlines()[0][:300]})"

    def _lost(self, why: str) -> LongtakeError:
        ranks = self.own.comm.world
        return LongtakeError(
            f"the {ranks} ranks that share this video have lost each other",
            got=why,
            expected=f"an answer of every rank within {self.own.comm.patience:g} s",
            fix=RESUME,
        )

    def peak_bytes(self) -> int:
        """See Backend.peak_bytes: the first rank's."""
        return self.own.peak_bytes()

    def close(self) -> None:
        """See Backend.close: the others end. Who waits for a rank that does not answer is not waited for."""
        idle = self._turn.acquire(timeout=CLOSE_S)
        if not idle:
            self.followers.end()  # gloo's exchanges break now
            idle = self._turn.acquire(timeout=CLOSE_S)
        if not self._closed:
            self._closed = True
            if idle and not self.failure:
                self.followers.end(politely=True)
                self.own.release()
                self.own.comm.leave()
        if idle:
            self._turn.release()
            self.own.close()

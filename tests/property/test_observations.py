"""What a cache keeps of a waiting prompt besides keys and values: queries, and the attention of a second reading.

**The law.**  Whatever happened to the cache before, the queries that a policy is shown are those of the last
tokens that it is shown, row by row, wherever a row is padded; there are as many of them as were observed without a gap,
up to 64; and the attention it is shown is that of the very tokens, 1 for those that came later.

Every token here has a number.  It stands in the keys and in the queries, so a policy can tell.
"""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from integration.tiny import LosslessCache, reachable_bytes
from torch import Tensor

from nexusquant_cache import EvictionPolicy, ScoreInputs
from nexusquant_cache.errors import ShapeError
from nexusquant_cache.layer.parts import part_of

# Where some of the attention is not seen, all tokens stay.
pytestmark = pytest.mark.filterwarnings("ignore:the attention of layer . was not seen")

HEADS, GROUP, HEAD_DIM = 2, 2, 8
QUERIES = 64  # the most that a policy is shown, if it does not ask for more
SETTINGS: dict[str, Any] = {
    "sink_tokens": 1,
    "residual_length": 2,
    "flush_length": 2,
    "min_tokens": 4,
    "min_kept": 0,
    "most_code_error": 1e9,  # numbers make strange keys
}


class Witness(EvictionPolicy):
    """Checks what it is shown."""

    wants_queries = True  # in place of the property

    def __init__(self) -> None:
        self.shown: list[int] = []  # queries at each compression

    def __deepcopy__(self, memo: Any) -> "Witness":
        return self

    def __reduce__(self) -> Any:
        return (witness, ())

    def score(self, inputs: ScoreInputs) -> Tensor:
        numbers = inputs.keys[..., 0]
        self.shown.append(0)
        if inputs.queries is not None:
            count = inputs.queries.shape[2]
            self.shown[-1] = count
            asked = inputs.grouped_queries[..., 0]
            assert torch.equal(asked, numbers[:, :, None, -count:].expand_as(asked))
        if inputs.reconstruction is not None:
            known = inputs.reconstruction < 1
            assert known[..., 0].all()
            assert torch.equal(inputs.reconstruction[known], numbers[known] / 2**20)
        return numbers


WITNESS = Witness()


def witness() -> Witness:
    return WITNESS


class ObservationMachine(RuleBasedStateMachine):
    """A cache, the numbers of its tokens, and of how many of the newest of each prompt queries must be there."""

    @initialize(keep_ratio=st.sampled_from([0.5, 0.2]), rows=st.integers(1, 3), padded=st.booleans())
    def start(self, keep_ratio: float, rows: int, padded: bool) -> None:
        self.pads = [0, 3, 7][:rows] if padded else [0] * rows
        self.cache = LosslessCache("quant", keep_ratio=keep_ratio, policy=WITNESS, **SETTINGS)
        self.numbers = torch.zeros(rows, 0)
        self.real = torch.ones(rows, 0, dtype=torch.bool)
        self.next = 1
        self.known = 0  # queries that must be there
        WITNESS.shown.clear()

    @property
    def seen(self) -> int:
        return self.numbers.shape[1]

    @property
    def layers(self) -> list[Any]:
        return self.cache.layers

    def states(self, numbers: Tensor, heads: int) -> Tensor:
        states = torch.randn(*numbers.shape, heads, HEAD_DIM).transpose(1, 2).contiguous()
        states[..., 0] = numbers[:, None]
        return states

    def draw(self, tokens: int) -> Tensor:
        rows = len(self.pads)
        numbers = self.next + torch.arange(rows * tokens).view(tokens, rows).T.float()
        self.next += rows * tokens
        return numbers

    def update(self, tokens: int, window: int, padding: tuple[int, int] = (0, 0)) -> None:
        """Bring tokens to both layers, and let them see the attention of the last ``window`` of them.

        Args:
            tokens: How many.
            window: Of how many there are queries; of none, attention is not seen.
            padding: From where to where tokens of all rows but the first are padding, besides what all begin with.
        """
        numbers, before = self.draw(tokens), self.waiting
        self.real = torch.cat([self.real, self.real_tokens(tokens, padding)], 1)
        for index in (0, 1):
            self.update_layer(index, numbers, window)
        self.numbers = torch.cat([self.numbers, numbers], 1)
        if not self.waiting:
            self.known = 0
            return
        joined = before and window >= min(tokens, QUERIES) == tokens
        self.known = min((self.known if joined else 0) + min(window, tokens), QUERIES)
        self.check()

    def real_tokens(self, tokens: int, padding: tuple[int, int]) -> Tensor:
        places = torch.arange(self.seen, self.seen + tokens)
        real = places >= torch.tensor(self.pads)[:, None]
        real[1:, padding[0] : padding[1]] = False
        return real

    def update_layer(self, index: int, numbers: Tensor, window: int) -> None:
        keys = self.states(numbers, HEADS)
        states = self.cache.update(keys, torch.randn_like(keys), index)
        if not window:
            return
        seen = self.real.shape[1]
        causal = torch.arange(seen) <= torch.arange(seen - window, seen)[:, None]
        visible = (self.real[:, None] & causal)[:, None]
        F.scaled_dot_product_attention(
            self.states(numbers[:, -window:], HEADS * GROUP), *states, visible, enable_gqa=True
        )

    @property
    def waiting(self) -> bool:
        return any(layer.state.turn.is_pending for layer in self.layers)

    def check(self) -> None:
        for layer in self.layers:
            found = layer.state.observed.last_queries(QUERIES, self.seen)
            assert (0 if found is None else found.shape[2]) == self.known

    @rule(
        tokens=st.one_of(st.integers(2, 20), st.integers(2, 150)),
        shown=st.sampled_from(["all", "all", "none", "few"]),
        padding=st.tuples(st.integers(0, 30), st.integers(0, 150)),
    )
    def prompt(self, tokens: int, shown: str, padding: tuple[int, int] = (0, 0)) -> None:
        self.update(tokens, {"all": tokens, "none": 0, "few": min(tokens, 3)}[shown], padding)

    @rule(steps=st.integers(1, 4))
    def generation_steps(self, steps: int) -> None:
        for _ in range(steps):
            self.update(1, 1)

    @precondition(lambda self: self.seen and self.waiting)
    @rule(tokens=st.integers(1, 150))
    def failing_forward(self, tokens: int) -> None:
        """The second layer fails; the first, whose queries have been shown, takes the tokens back."""
        numbers, real = self.draw(tokens), self.real
        self.real = torch.cat([real, self.real_tokens(tokens, (0, 0))], 1)
        self.update_layer(0, numbers, tokens)
        self.real = real
        keys = self.states(numbers, HEADS)
        with pytest.raises(ShapeError):
            self.cache.update(keys[..., :4], torch.randn_like(keys), 1)
        if self.layers[0].state.turn.is_pending:
            self.check()
        else:  # the forward was a generation step and has compressed the first layer; the second follows
            self.update(1, 1)

    @precondition(lambda self: self.waiting and all(layer.state.turn.pending_from == 0 for layer in self.layers))
    @rule()
    def reconstruct(self) -> None:
        attention = (self.numbers / 2**20)[:, None].expand(-1, HEADS, -1)
        for layer in self.layers:
            part_of(layer, 0).observe_reconstruction(attention.clone())

    @precondition(lambda self: self.seen)
    @rule(tokens=st.integers(0, 80))
    def crop(self, tokens: int) -> None:
        tokens = min(tokens, self.layers[0].state.tail_tokens)
        self.cache.crop(-tokens)
        self.real = self.real[:, : self.seen - tokens]
        self.numbers = self.numbers[:, : self.seen - tokens]
        # At least what is left of them; all that were there before the last update, if just that goes.
        left = self.layers[0].state.observed.last_queries(QUERIES, self.seen)
        least = max(self.known - tokens, 0) if self.waiting else 0
        self.known = least if left is None else left.shape[2]
        assert self.known >= least
        self.check()

    def take(self, rows: list[int]) -> None:
        self.numbers, self.real = self.numbers[rows], self.real[rows]
        self.pads = [self.pads[row] for row in rows]

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.integers(0, len(self.pads) - 1), min_size=len(self.pads), max_size=len(self.pads)))
        self.cache.reorder_cache(torch.tensor(rows))
        self.take(rows)

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.integers(0, len(self.pads) - 1), min_size=1, max_size=3))
        self.cache.batch_select_indices(torch.tensor(rows))
        self.take(rows)

    @precondition(lambda self: self.seen and len(self.pads) < 3)
    @rule()
    def repeat(self) -> None:
        self.cache.batch_repeat_interleave(2)
        self.take([row for row in range(len(self.pads)) for _ in (0, 1)])

    @rule()
    def compress(self) -> None:
        self.cache.compress()
        self.known = 0

    @rule(how=st.sampled_from(["copy", "pickle", "offload"]))
    def move(self, how: str) -> None:
        if how == "copy":
            self.cache = copy.deepcopy(self.cache)
        elif how == "pickle":
            self.cache = pickle.loads(pickle.dumps(self.cache))  # noqa: S301 - our own
        else:
            for layer in self.layers:
                if layer.is_initialized:
                    layer.offload()
                    layer.prefetch()

    def teardown(self) -> None:
        """Every byte is counted, and after the compression nothing is left of queries."""
        if not self.seen:
            return
        held = self.cache.memory_report().held_bytes
        assert held <= reachable_bytes(self.cache)
        self.cache.compress()
        assert all(layer.state.observed.queries is layer.state.observed.reconstruction is None for layer in self.layers)


TestObservationMachine = ObservationMachine.TestCase
TestObservationMachine.settings = settings(stateful_step_count=12, max_examples=2 * settings().max_examples)


@pytest.mark.parametrize("name", ["crop", "reorder", "select", "repeat", "copy", "pickle", "offload", "prompt"])
def test_the_second_reading_goes_where_its_tokens_go(name: str) -> None:
    """One operation at a time between the reading and the compression, in which the policy checks every number."""
    machine = ObservationMachine()
    machine.start(keep_ratio=0.5, rows=2, padded=True)
    machine.update(50, 50)
    machine.reconstruct()
    if name == "crop":
        machine.crop(11)
    elif name == "prompt":
        machine.update(20, 20)
    elif name == "repeat":
        machine.repeat()
    elif name in {"reorder", "select"}:
        rows = [1, 1] if name == "reorder" else [1]
        getattr(machine.cache, "reorder_cache" if name == "reorder" else "batch_select_indices")(torch.tensor(rows))
        machine.take(rows)
    else:
        machine.move(name)
    assert all(layer.state.observed.reconstruction is not None for layer in machine.layers)
    machine.compress()
    assert WITNESS.shown


def test_the_policy_is_shown_queries() -> None:
    """So that the checks above are not of nothing."""
    machine = ObservationMachine()
    machine.start(keep_ratio=0.5, rows=2, padded=True)
    machine.prompt(40, "all")
    machine.prompt(50, "all")
    machine.generation_steps(1)
    machine.prompt(30, "all")
    machine.crop(10)
    machine.compress()
    assert WITNESS.shown == [QUERIES] * 4 + [28] * 4  # two groups of rows in two layers

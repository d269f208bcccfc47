"""A model's lane on the ranks behind the first one: it does what rank 0 says (`engine.generation.leading`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import mlx.core as mx
from pydantic import Field

from engine.adapters.flat import Matrices
from engine.adapters.lora import LoraConfig, LoraWeights
from engine.generation.lane import GenerateLane
from engine.generation.prompt import of_ids
from engine.generation.row import Generation
from engine.ticket import StepOutput, Ticket
from engine.training.ranks import Ranks, of_rank_0
from stoker.contract import FinishReason, GenerateRequest, GenerateResult, StreamToken
from stoker.contract.base import Adapter, Message

Count = Annotated[int, Field(ge=1, lt=2**40)]


class Answer(Message):
    """How far a row had come when its job was admitted."""

    tokens: tuple[int, ...]
    finish_reason: FinishReason | None


class Admission(Message):
    """A job as rank 0 took it in. `request`: with the adapter's version, and of its `prompt`, which may have more
    tokens than a request may name, the first alone. `submitted`: by the clock of rank 0, by which rows make way."""

    number: Count
    submitted: float
    request: GenerateRequest
    prompt: tuple[int, ...]
    answers: tuple[Answer, ...]

    @classmethod
    def of(cls, number: int, work: Generation) -> Admission:
        without_text = of_ids(work.request, work.prompt[:1]).model_copy(update={"tools": None, "template": None})
        return cls(
            number=number,
            submitted=work.ticket.submitted,
            request=without_text,
            prompt=tuple(work.prompt),
            answers=tuple(Answer(tokens=tuple(row.tokens), finish_reason=row.finish_reason) for row in work.rows),
        )

    @property
    def published(self) -> list[StreamToken]:
        """The tokens with which the job goes on, as `Generation.resume` takes them."""
        found: list[StreamToken] = []
        for completion, answer in enumerate(self.answers):
            for index, token in enumerate(answer.tokens):
                last = index == len(answer.tokens) - 1
                found.append(
                    StreamToken(
                        index=len(found), token_id=token, text="", logit=0.0, logprob=0.0, probability=0.0,
                        is_eos=False, finish_reason=answer.finish_reason if last else None, completion=completion,
                    )
                )  # fmt: skip
        return found


class FollowedLane:
    """`lane`: over this rank's part of the model, with rank 0's clock; warm."""

    def __init__(self, lane: GenerateLane) -> None:
        self._lane = lane
        self._tickets: dict[int, Ticket[GenerateResult]] = {}

    def admit(self, admission: Admission) -> None:
        request = of_ids(admission.request, admission.prompt)
        ticket: Ticket[GenerateResult] = Ticket(str(admission.number), request.kind, priority=request.priority)
        ticket.submitted = admission.submitted
        self._lane.admit(self._lane.prepare(ticket, request, admission.published, passed=True))
        self._tickets[admission.number] = ticket

    def drop(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._tickets.pop(number).cancel()
        self._lane.drop_stopped()

    def forget(self, name: str, version: int) -> None:
        self._lane.forget(name, version)

    def turn(self, *, lookahead: bool) -> StepOutput:
        output = self._lane.run(lookahead=lookahead)
        for ticket, _ in output.ended:
            del self._tickets[int(ticket.job_id)]
        # An error refers to what the step had in hand, as the keys and values of a prompt.
        self._tickets = {number: ticket for number, ticket in self._tickets.items() if not ticket.done}
        return output


class LentAdapter(Message):
    """An adapter's small part. Its matrices follow as one array, by layer and then by side."""

    name: Adapter
    version: Count
    rank: Count
    alpha: float
    targets: tuple[str, ...]
    rslora: bool
    dora: bool
    layers: tuple[str, ...]

    @classmethod
    def of(cls, name: str, version: int, weights: LoraWeights) -> LentAdapter:
        config, layers = weights.config, tuple(sorted(weights.matrices))
        return cls(
            name=name, version=version, rank=config.rank, alpha=config.alpha, targets=config.targets,
            rslora=config.rslora, dora=config.dora, layers=layers,
        )  # fmt: skip

    def send(self, ranks: Ranks, weights: LoraWeights) -> None:
        """Rank 0's side of `receive`."""
        sides = [weights.matrices[layer][side] for layer in self.layers for side in self._sides]
        of_rank_0(ranks, mx.concatenate([side.astype(mx.float32).reshape(-1) for side in sides]))

    def receive(self, ranks: Ranks, layers: Mapping[str, tuple[int, int]]) -> LoraWeights:
        """`layers`: (in, out) of each, whole."""
        shapes: list[tuple[str, str, tuple[int, ...]]] = []
        for layer in self.layers:
            inputs, outputs = layers[layer]
            whole = {"a": (inputs, self.rank), "b": (self.rank, outputs), "m": (outputs,)}
            shapes += [(layer, side, whole[side]) for side in self._sides]
        found = of_rank_0(ranks, mx.zeros((sum(math.prod(shape) for *_, shape in shapes),)))
        matrices: Matrices = {}
        start = 0
        for layer, side, shape in shapes:
            end = start + math.prod(shape)
            matrices.setdefault(layer, {})[side] = found[start:end].reshape(shape)
            start = end
        return LoraWeights(LoraConfig(self.rank, self.alpha, self.targets, self.rslora, self.dora), matrices)

    @property
    def _sides(self) -> tuple[str, ...]:
        return ("a", "b", "m") if self.dora else ("a", "b")

"""Generation: the engine streams the tokens, this returns the whole."""

from __future__ import annotations

from functools import partial

from stoker.broker import keys
from stoker.contract import GenerateRequest, GenerateResult, StreamToken
from workers import adapters
from workers.job import Job, JobHandler, Submit, job_task


class GenerateHandler(JobHandler[GenerateRequest, list[StreamToken], GenerateResult]):
    request = GenerateRequest

    def prepare(self, job: Job, request: GenerateRequest) -> GenerateRequest:
        """A job keeps the version of its adapter that it began with, also under another owner."""
        if request.adapter is not None:
            request = request.model_copy(update={"adapter": adapters.pinned(job, request.model, request.adapter)})
        job.place(request)
        return request

    def load_input(self, job: Job, request: GenerateRequest) -> list[StreamToken]:
        """The tokens that an earlier owner published: the engine goes on behind them. Where a fail-over has lost some,
        behind those before them: the text would lack what is missing, in silence."""
        if not job.claim.resumed:
            return []
        rows = job.runtime.redis.xrange(keys.stream(job.id))
        tokens = [StreamToken.model_validate_json(fields[b"entry"]) for _, fields in rows]
        return [token for due, token in enumerate(tokens) if token.index == due]

    def submit(self, job: Job) -> Submit[GenerateRequest, list[StreamToken], GenerateResult]:
        # By its record: another owner's prompt has the same date.
        return partial(job.where_it_fits, partial(job.runtime.engine.submit, sent=job.claim.submitted))

    def finish(self, job: Job, request: GenerateRequest, result: GenerateResult) -> GenerateResult:
        job.note_beginnings()
        return result.model_copy(update={"usage": job.usage(result.usage)})


generate = job_task(GenerateHandler())

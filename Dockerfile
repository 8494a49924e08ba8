# Graftwork as an image. docs/deploy/containers.md says how to run it, and every argument below.
#
#     docker build -t graftwork .
#     docker run --rm --read-only --cap-drop ALL --tmpfs /tmp -v graftwork:/data -p 127.0.0.1:8000:8000 graftwork
#
# Stages: what Python needs, the default base, our own code, and the image itself, where each of them is
# a layer. No compiler, cache or test ends up in it; it runs as user 10001 and writes to /data and
# /tmp only.

# To pin by digest: python:3.11-slim-bookworm@sha256:… (docker buildx imagetools inspect shows it).
ARG PYTHON_IMAGE=python:3.11-slim-bookworm


FROM ${PYTHON_IMAGE} AS packages
# cpu or cuda: which build of torch.
ARG TORCH=cpu
# An index that has that build, where pip's own does not.
ARG TORCH_INDEX_URL
# pip reads these itself.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build
RUN python3 -m venv /opt/venv
COPY constraints.txt docker/install_torch.sh ./
RUN sh install_torch.sh "$TORCH"
COPY pyproject.toml docker/requirements.py ./
# setuptools builds our own package in a later stage.
RUN python requirements.py otel > requirements.txt \
    && pip install -c constraints.txt -r requirements.txt setuptools


FROM packages AS base
# default: SmolLM2-135M-Instruct, fetched now. none: /base stays empty, to be mounted.
ARG BASE=default
# Only what that imports, so that other changes leave this layer alone.
COPY adapters/__init__.py adapters/base_files.py adapters/errors.py adapters/peft_names.py adapters/
COPY server/__init__.py server/
COPY server/base server/base
RUN mkdir /base && if [ "$BASE" = default ]; then python -m server.base --out /base; fi


FROM packages AS code
COPY . .
RUN pip install --no-deps --no-build-isolation --target /opt/app .


FROM packages AS lean
# What only compilers and tests read.
RUN site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
    && pip uninstall --quiet --yes setuptools pip \
    && rm -rf "$site/torch/include" "$site/torch/test" \
    && find "$site" -depth -type d -name tests -exec rm -rf {} +


FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="Graftwork" \
      org.opencontainers.image.description="Many PEFT adapters on one frozen base model" \
      org.opencontainers.image.licenses="Apache-2.0"
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* \
    && groupadd --gid 10001 graftwork \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin graftwork \
    && install --directory --owner=10001 --group=10001 --mode=0750 /data
COPY --from=lean /opt/venv /opt/venv
COPY --from=base /base /base
COPY --from=code /opt/app /opt/app
COPY docker/backup.py docker/drain.py docker/healthcheck.py /opt/
ENV PATH=/opt/app/bin:/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/app \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    NUMBA_CACHE_DIR=/tmp/numba \
    HF_HOME=/data/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    GRAFTWORK_BASE=/base \
    GRAFTWORK_DATA_DIR=/data \
    GRAFTWORK_LOG_FORMAT=json
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
# The base has to be loaded first; /readyz is 503 until then.
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python3", "/opt/healthcheck.py"]
ENTRYPOINT ["tini", "--", "graftwork"]
CMD ["serve", "--host", "0.0.0.0"]

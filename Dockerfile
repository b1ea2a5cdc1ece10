# docker build -t logto-webhooks --build-arg PYTHON_IMAGE=python:3.11-slim@sha256:… .
# (docs/how-to/deploy.md says where the digest comes from, and how to run the image)
ARG PYTHON_IMAGE
FROM ${PYTHON_IMAGE} AS build
ARG PYTHON_IMAGE
# Without a digest, the base image could change between two builds.
RUN case "$PYTHON_IMAGE" in *@sha256:????????????????????????????????????????????????????????????????) ;; *) echo "PYTHON_IMAGE must end in @sha256: and a digest, see docs/how-to/deploy.md" >&2; exit 1 ;; esac
WORKDIR /src
RUN python -m venv /app && python -m venv /build
COPY requirements.txt requirements-build.txt ./
RUN /app/bin/pip install --no-cache-dir --require-hashes -r requirements.txt \
 && /build/bin/pip install --no-cache-dir --require-hashes -r requirements-build.txt
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY src src
RUN /build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /dist . \
 && /app/bin/pip install --no-cache-dir --no-index --no-deps /dist/*.whl

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin logto \
 && install --directory --owner logto --group logto /data
COPY --from=build /app /app
# A SQLite file is stored in /data. Apart from that, only temporary files are written.
ENV PATH=/app/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    LOGTO_WEBHOOKS_DATABASE_URL=sqlite:////data/logto-webhooks.db \
    LOGTO_WEBHOOKS_PORT=8787
WORKDIR /data
VOLUME /data
USER 10001:10001
EXPOSE 8787
# Not /readyz: a restart doesn't repair the database.
HEALTHCHECK --interval=10s --timeout=6s --start-period=20s \
    CMD ["python", "-c", "import http.client, os; it = http.client.HTTPConnection('127.0.0.1', int(os.environ['LOGTO_WEBHOOKS_PORT']), timeout=5); it.request('GET', '/healthz'); exit(it.getresponse().status != 200)"]
ENTRYPOINT ["logto-webhooks"]
# 127.0.0.1 in a container can't be reached from outside.
CMD ["serve", "--host", "0.0.0.0"]

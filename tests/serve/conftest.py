"""One service for all tests that change nothing of it."""

from collections.abc import Iterator

import pytest
from serve.models import Client, settings

from lt4rec_sparse.ranker import load
from lt4rec_sparse.serve.service import Service


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    service = Service(settings(tmp_path_factory.mktemp("served")))
    service.load()
    client = Client(service)
    yield client
    client.close()


@pytest.fixture(scope="module")
def ranker(client: Client):
    return load(client.service.settings.artefact)

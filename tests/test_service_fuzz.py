"""Requests made up from the service's own schema, right and wrong ones: every answer is one that the schema tells."""

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.specs.openapi import checks

from repkit.service.settings import Settings
from tests.service_cases import COUNT, asking, make_index, running, vectors_of

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
NO_MODEL = ("/v1/search/image", "/v1/items/image", "/v1/match")  # 503 without one, which is what they tell
QUICK, THOROUGH = 8, 200
LONGEST = 30_000  # characters: the service hangs up on an address that is longer than its headers may be


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    load_all_checks()
    folder = make_index(tmp_path_factory.mktemp("indexes") / "index", vectors_of())
    with running(Settings(index=folder)) as (url, _), asking(url) as http:
        yield url, schemathesis.openapi.from_dict(http.get("/v1/openapi.json").json())


def fuzz(url, schema, examples):
    seen, statuses = set(), set()
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @hypothesis.settings(
                max_examples=examples,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
                deadline=None,
                derandomize=True,
                database=None,
            )
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def ask(case):
                hypothesis.assume(len(str(case.as_transport_kwargs(base_url=url))) < LONGEST)
                answer = case.call(base_url=url, timeout=20)
                statuses.add(answer.status_code)
                if case.path in NO_MODEL and answer.status_code == 503:
                    return
                case.validate_response(answer, checks=CHECKS)

            try:
                ask()
            except hypothesis.errors.Unsatisfiable:  # nothing wrong can be sent where nothing is
                continue
        seen.add((operation.method.upper(), operation.path))
    return seen, statuses


def test_a_few_requests_of_every_kind(served):
    url, schema = served
    seen, statuses = fuzz(url, schema, QUICK)
    assert len(seen) == len([1 for one in schema.get_all_operations()]) > 15
    assert {200, 404, 422} <= statuses
    with asking(url) as http:
        assert http.get("/readyz").status_code == 200 and http.get("/v1/count").json()["count"] > COUNT / 2


@pytest.mark.slow
def test_many_requests_of_every_kind(served):
    url, schema = served
    fuzz(url, schema, THOROUGH)

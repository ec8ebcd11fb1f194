"""The kernels' tests in Triton's interpreter, which has to be switched on before Triton loads.

They take minutes and one core, so their process is started with the session (`conftest`) and runs
beside the other tests; here its end is waited for.
"""

import pytest

from tests.conftest import INTERPRETED


def test_kernels_in_the_interpreter(request: pytest.FixtureRequest) -> None:
    process, output = request.config.stash[INTERPRETED]
    if process is None:
        pytest.skip("triton is not installed")
    status = process.wait(timeout=880)
    printed = output.read_text()
    print(printed)
    assert status == 0, printed[-10_000:]

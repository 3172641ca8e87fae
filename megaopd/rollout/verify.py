"""Does a server hold the weights that it was sent?

Two ways to know. A checksum compares every bit of every parameter, where the release has
/weights_checker and the model is not quantised; it does not see what a server computes with them. A
probe compares the log-probs of a fixed text with the trainer's own: it sees the whole path, up to
the noise between two implementations. In float32 that noise is some 1e-5, so that any wrong tensor
shows; in 16 bits it is some 1e-2, and weights of the step before may pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megaopd.rollout.base import Probe
from megaopd.rollout.checksum import Checksums
from megaopd.rollout.http import ServerClient, ServerError

if TYPE_CHECKING:
    from megaopd.rollout.member import Server

# Largest mean difference of log-probs that is noise, by the coarser of the two sides' dtypes; the
# largest single one may be ten times that. Rounding is relative: for log-probs beyond SIZE in the
# mean, as of tokens that a model holds for impossible, both grow with them.
SIZE = 4.0
TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.1, "float8_e4m3fn": 0.3}
TIMEOUT_S = 120.0


def tolerance(*dtypes: str) -> float:
    """For the log-probs of two sides, or of weights that came through several dtypes."""
    return max(TOLERANCE[dtype] for dtype in dtypes)


@dataclass(frozen=True)
class Gap:
    """Differences between the log-probs of an engine and those it should have."""

    mean: float  # of the magnitudes
    worst: float  # the largest of them
    tolerance: float  # on the mean; ten times that on the worst

    @property
    def why(self) -> str:
        """Empty where it is noise."""
        if self.mean <= self.tolerance and self.worst <= 10 * self.tolerance:
            return ""
        return (
            f"log-probs of the probe differ by {self.mean:.3g} in the mean and {self.worst:.3g} "
            f"at most; expected noise of at most {self.tolerance:g} and {10 * self.tolerance:g}"
        )


async def score(
    client: ServerClient, token_ids: Sequence[int], *, timeout: float = TIMEOUT_S
) -> list[float]:
    """log-probs, at temperature 1, of token_ids[1:], each given what stands before it.

    The server must not be paused.

    Raises:
        ServerError: it did not answer, or not with a number for every token.
    """
    body = {
        "input_ids": list(token_ids),
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 1},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    answer = await client.post("/generate", body, timeout=timeout)
    entries = answer["meta_info"]["input_token_logprobs"][1:]
    if [entry[1] for entry in entries] != list(token_ids[1:]):
        raise ServerError(client.url, "/generate", 200, "log-probs are not those of the probe")
    return [float(entry[0]) for entry in entries]


async def verify_log_probs(
    server: "Server", probe: Probe, tolerance: float, *, timeout: float = TIMEOUT_S
) -> Gap:
    """How far a server is from the trainer on the probe's text; raises as `score`."""
    got = await score(server.client, probe.token_ids, timeout=timeout)
    gaps = [abs(a - b) for a, b in zip(got, probe.log_probs, strict=True)]
    # A NaN must not pass as small: `max` and comparisons would let it.
    gaps = [gap if gap == gap else float("inf") for gap in gaps]
    size = sum(abs(value) for value in probe.log_probs) / len(gaps)
    return Gap(sum(gaps) / len(gaps), max(gaps), tolerance * max(1.0, size / SIZE))


async def verify_checksums(
    server: "Server", expected: Checksums, *, timeout: float = TIMEOUT_S
) -> str:
    """Why the server's parameters are not those that were sent; "" where they are.

    Raises:
        ServerError: no answer, or the server cannot say.
    """
    answer = await server.client.control(
        "/weights_checker", {"action": "checksum"}, timeout=timeout
    )
    why = expected.compare(answer.get("ranks", []))
    return f"weights are not those that were sent: {why}" if why else ""


def no_checksums(server: "Server") -> str:
    """Why a server's checksums cannot be known ahead; "" where they can."""
    info = server.info
    if not server.capabilities.checksum:
        return "this release has no /weights_checker"
    if info.get("quantization"):
        return f"it runs quantization={info['quantization']}"
    for key in ("pp_size", "ep_size"):
        if info.get(key, 1) != 1:
            return f"it runs {key}={info[key]}"
    if info.get("enable_dp_attention"):
        return "it runs data-parallel attention"
    return ""

"""One server: the model that it serves, and whether it holds the trainer's weights, tested with a probe text.

After a reload that silently did nothing, the run would train on stale samples. So the server scores a probe text after
each reload: the result must agree with the trainer's own weights, and must have moved as they have.

Shapes: T tokens of the probe text.
"""

from collections.abc import Sequence

import numpy as np

from bondlm.engines.vllm.http import VLLMClient
from bondlm.errors import ConfigError, EngineError

GAP_LIMIT = 0.5  # nats per token (fault N7): beyond rounding, the server holds other weights
# The limit for weights that are not trained yet: rounding in bf16 changed the probe by 0.03 to 0.06, whereas a model
# that was fine-tuned for six steps differed by 0.26.
FIRST_GAP_LIMIT = 0.15
LEAST_NOISE = 1e-5  # nats per token: rounding in fp32 on both sides
NOISE_RATIO = 2.0  # times the first gap: rounding alone moves a side that learns in bf16 up to 1.6 times as far
GAP_GROWTH = 4.0  # times the first gap, which comes from the rounding of two programs
LEAST_GAP_LIMIT = 1e-3  # nats per token; smaller gaps are rounding in fp32
# Rounding grows with the logits: a gap of up to this part of the model's way since the first probe is not refused.
DRIFT_RATIO = 0.05
STALE_RATIO = 0.25  # a reload moves the probe about as far as the trainer's weights do (1), a stale one not at all (0)


class Served:
    """A server, and its results for the probe text so far."""

    def __init__(self, client: VLLMClient, probe_ids: Sequence[int]) -> None:
        """Ask the server which model it serves.

        Args:
            client: the connection.
            probe_ids: the probe text (T).

        Raises:
            ConfigError: there is no vLLM server, or it is asleep.
        """
        self.client, self._probe_ids = client, probe_ids
        self.base, self.max_model_len = client.base_model()
        if client.is_asleep():
            raise ConfigError(f"the vLLM server at {client.url} is asleep: wake it with POST {client.url}/wake_up")
        self.gap_limit = FIRST_GAP_LIMIT
        self.noise = LEAST_NOISE  # nats per token: if the trainer's probe moves by more, the server's must move too
        self._ours = self._theirs = np.zeros(0)  # the last probe (T - 1) of trainer and server
        self.gap = 0.0  # mean absolute difference to the trainer at the last probe, nats per token
        self._first: np.ndarray | None = None  # the trainer's probe (T - 1) at the first gap
        self._moved: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # probe of trainer and server when it last moved

    def probe(self, name: str, salt: str, ours: np.ndarray) -> np.ndarray:
        """The log-probabilities (T - 1) of the probe text under the model of that name; sets `gap` to `ours`."""
        self._ours = ours
        self._theirs = theirs = np.asarray(self.client.prompt_logprobs(name, self._probe_ids, salt))
        self.gap = float(np.abs(ours - theirs).mean())
        return theirs

    def take_first_gap(self) -> None:
        """Take the gap of the last probe, with the same weights on both sides, as the effect of rounding on the probe.

        In mixed precision each step rounds anew on either side, so the server must move only if the trainer moves
        further. A server that takes only a part of the weights moves nearly as far as the trainer: the gap shows it.
        """
        self.noise = max(LEAST_NOISE, NOISE_RATIO * self.gap)
        self.gap_limit = min(GAP_LIMIT, max(LEAST_GAP_LIMIT, GAP_GROWTH * self.gap))
        self._first = self._ours

    def _limit(self, ours: np.ndarray) -> float:
        """The largest gap that rounding explains."""
        drift = 0.0 if self._first is None else float(np.abs(ours - self._first).mean())
        return max(self.gap_limit, min(GAP_LIMIT, DRIFT_RATIO * drift))

    def mismatch(self, name: str, salt: str, ours: np.ndarray) -> str:
        """Why the server cannot be holding our weights under `name`; empty if it may be."""
        theirs = self.probe(name, salt, ours)
        if not self.gap <= (limit := self._limit(ours)):
            return f"server and trainer differ by {self.gap:.2g} nats per token on a probe text (limit {limit:.2g})"
        if name in self._moved:
            our_move, their_move = (
                float(np.abs(now - before).mean())
                for now, before in zip((ours, theirs), self._moved[name], strict=True)
            )
            if our_move <= self.noise:
                return ""  # keep the point of comparison, so that small moves add up
            if their_move < STALE_RATIO * our_move:
                return (
                    f"the reload did nothing: the probe text's log-probabilities moved by {our_move:.2e} nats per "
                    f"token in the trainer, by {their_move:.2e} on the server"
                )
        self._moved[name] = (ours, theirs)
        return ""

    def scores_as_before(self, name: str, salt: str, ours: np.ndarray) -> bool:
        """Probe; whether the server's own score is that of the last probe, of weights that should be there still.

        It needs not agree to the bit: a server may round otherwise next to other requests.
        """
        before = self._theirs
        change = float(np.abs(self.probe(name, salt, ours) - before).mean())
        return change <= max(LEAST_GAP_LIMIT, self.noise / NOISE_RATIO / 2)  # half the first gap

    def require_model(self, ours: np.ndarray, salt: str, trained: str) -> None:
        """Check that it serves the model named `trained`, which gives the probe text the log-probabilities `ours`.

        Raises:
            ConfigError: it serves another model.
        """
        url = self.client.url
        try:
            self.probe(self.base, salt, ours)
        except EngineError as error:
            raise ConfigError(f"the vLLM server at {url} does not match: {error}") from error
        if not self.gap <= self.gap_limit:
            raise ConfigError(
                f"the vLLM server at {url} serves {self.base!r}, another model than the trainer's: their "
                f"log-probabilities of a probe text differ by {self.gap:.3f} nats per token (limit "
                f"{self.gap_limit}). Start it with --model {trained!r}, or, if the trainer's was changed in memory, "
                "with a folder that it was saved to; and without --quantization"
            )

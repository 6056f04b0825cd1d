"""One server: what model it serves, and whether it holds the trainer's weights, by a probe text.

A reload that silently did nothing would train on stale samples. So the server scores a probe text afterwards: it must
agree with the trainer's own weights, and must have moved as they have.

Shapes: T tokens of the probe text.
"""

from collections.abc import Sequence

import numpy as np

from bondlm.engines.vllm.http import VLLMClient
from bondlm.errors import ConfigError, EngineError

GAP_LIMIT = 0.5  # nats per token (fault N7): beyond rounding, the server holds other weights
# The same of weights that nobody has trained yet: bf16 was seen to round them by 0.03 to 0.06 where a model that was
# fine-tuned for six steps differed by 0.26.
FIRST_GAP_LIMIT = 0.15
LEAST_NOISE = 1e-5  # nats per token: what fp32 rounds on both sides
NOISE_RATIO = 2.0  # times the first gap: by rounding alone a side that learns in bf16 moves up to 1.6 times as far
STALE_RATIO = 0.25  # a fresh reload moves the probe about as far as the trainer's weights do (1), a stale one not (0)


class Served:
    """A server, and what it said of the probe text so far."""

    def __init__(self, client: VLLMClient, probe_ids: Sequence[int]) -> None:
        """Ask what it serves.

        Args:
            client: the connection.
            probe_ids: the probe text (T).

        Raises:
            ConfigError: no vLLM server is there, or it sleeps.
        """
        self.client, self._probe_ids = client, probe_ids
        self.base, self.max_model_len = client.base_model()
        if client.is_asleep():
            raise ConfigError(f"the vLLM server at {client.url} is asleep: wake it with POST {client.url}/wake_up")
        self.gap_limit = FIRST_GAP_LIMIT
        self.noise = LEAST_NOISE  # nats per token: a larger move of the trainer's probe must be the server's, too
        self.gap = 0.0  # mean absolute difference to the trainer at the last probe, nats per token
        self._moved: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # probe of trainer and server when last it moved

    def probe(self, name: str, salt: str, ours: np.ndarray) -> np.ndarray:
        """The log-probabilities (T - 1) of the probe text under the model of that name; notes their `gap` to `ours`."""
        theirs = np.asarray(self.client.prompt_logprobs(name, self._probe_ids, salt))
        self.gap = float(np.abs(ours - theirs).mean())
        return theirs

    def take_first_gap(self) -> None:
        """Take the last probe's gap, of weights that both sides have, for what their rounding does to the probe.

        In mixed precision each step rounds anew, on whichever side: only a larger move says that the server must move.
        """
        self.noise, self.gap_limit = max(LEAST_NOISE, NOISE_RATIO * self.gap), GAP_LIMIT

    def mismatch(self, name: str, salt: str, ours: np.ndarray) -> str:
        """Why the server cannot hold our weights under `name`; empty if it may."""
        theirs = self.probe(name, salt, ours)
        if not self.gap <= self.gap_limit:
            limit = f"{self.gap_limit:.2g}"
            return f"server and trainer differ by {self.gap:.2g} nats per token on a probe text (limit {limit})"
        if name in self._moved:
            our_move, their_move = (
                float(np.abs(now - before).mean())
                for now, before in zip((ours, theirs), self._moved[name], strict=True)
            )
            if our_move <= self.noise:
                return ""  # compared with the same point next time, so that small moves add up
            if their_move < STALE_RATIO * our_move:
                return (
                    f"the reload did nothing: the probe text's log-probabilities moved by {our_move:.2e} nats per "
                    f"token in the trainer, by {their_move:.2e} on the server"
                )
        self._moved[name] = (ours, theirs)
        return ""

    def require_model(self, ours: np.ndarray, salt: str, trained: str) -> None:
        """See that it serves the model `trained` (a name), whose log-probabilities of the probe text are `ours`.

        Raises:
            ConfigError: it serves another one.
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

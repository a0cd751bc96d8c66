"""Metrics and pictures to the stage's MLflow run, from rank 0 only. Tracking that is down does not stop training."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longtake.datasets.errors import Failure, UserError

_FLUSH_SECONDS = 5.0


@dataclass
class Tracker:
    """Collects metrics and sends them in batches; what cannot be sent is kept and sent later."""

    run_id: str
    client: Any
    _waiting: list[Any] = field(default_factory=list)
    _sent_at: float = 0.0
    _trouble: str = ""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting += [Metric(name, float(value), now, step) for name, value in metrics.items()]
        if time.monotonic() - self._sent_at > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            while self._waiting:
                self.client.log_batch(self.run_id, metrics=self._waiting[:1000])
                del self._waiting[:1000]
            self._trouble = ""
        except (MlflowException, OSError) as e:
            if not self._trouble:
                print(f"tracking: {str(e).splitlines()[0]}; metrics are kept and sent later", flush=True)
            self._trouble = str(e)
        self._sent_at = time.monotonic()

    def artifacts(self, folder: Path, name: str) -> None:
        self.client.log_artifacts(self.run_id, str(folder), name)

    def close(self) -> None:
        """Send the rest. Raises Failure where that is not possible."""
        self.flush()
        if self._waiting:
            raise Failure(
                f"MLflow: {len(self._waiting)} metrics could not be sent ({self._trouble}); run the same command again"
            )


def connect() -> Tracker:
    """The run that MLFLOW_RUN_ID names, as `longtake stage` sets it. Raises UserError where it is not set."""
    if "MLFLOW_RUN_ID" not in os.environ:
        raise UserError("MLFLOW_RUN_ID: is not set; start training by `longtake run` or `longtake stage`")
    from mlflow import MlflowClient

    return Tracker(os.environ["MLFLOW_RUN_ID"], MlflowClient())

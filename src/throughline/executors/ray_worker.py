"""What Ray runs on its workers. Each is a process that has to import what it needs, so each function imports its own."""

import os
import shutil
import tempfile
import traceback
from typing import TYPE_CHECKING, Any

from throughline import lean_imports
from throughline.errors import ThroughlineError, TrainingError

if TYPE_CHECKING:
    from throughline.records import PlannedDevice
    from throughline.training.ranks import Ranks


class Lost(str):
    """How a worker was lost, where that is no failure of the job's own."""


def train(
    root: str, model: str, layers: list[int], attempt: int, cpus: float, ranks: "Ranks | None" = None
) -> tuple[list[str], str | None]:
    """Train one job. What it had to say, and why it failed, if it did."""
    said: list[str] = []
    try:
        lean_imports.wanted = ranks is None  # ranks need torch.distributed
        lean_imports.leave_out_unused()
        import ray
        import torch

        from throughline.jobs import Job, train_job
        from throughline.run_dir import RunDir
        from throughline.session import Session
        from throughline.training.ranks import ALONE

        torch.set_num_threads(max(1, int(cpus)))
        gpus = ray.get_gpu_ids()
        session = Session(RunDir.open(root), "cuda" if gpus else "cpu", said.append)
        session.device_name = f"cuda:{','.join(map(str, gpus))}" if gpus else f"cpu of process {os.getpid()}"
        train_job(session, Job(model, layers), lambda progress: None, attempt, ranks or ALONE)
    except ThroughlineError as error:
        return said, str(error)
    except OSError as error:
        return said, f"{error.filename or root}: {error.strerror or error}"
    except Exception as error:  # a fault of ours or of a library: the log has all of it
        traceback.print_exc()
        return said, f"{type(error).__name__}: {error}"
    return said, None


def train_together(
    root: str, model: str, layers: list[int], attempt: int, cpus: float, gpus: float, size: int, card: str | None
) -> tuple[list[str], str | None]:
    """Train one job on `size` devices, of which each computes a share of every batch. As `train`."""
    import ray
    from ray.exceptions import RayError
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    kept = tempfile.mkdtemp(prefix="tl-")  # Ray Train writes down there that it ran
    heard = ray.remote(num_cpus=0)(_Heard).remote()
    given = {"root": root, "model": model, "layers": layers, "attempt": attempt, "cpus": cpus, "heard": heard}
    trainer = TorchTrainer(
        _train_rank,
        train_loop_config=given,
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=size,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus} | ({"GPU": gpus} if gpus else {}),
            accelerator_type=card,
        ),
        run_config=RunConfig(storage_path=kept, failure_config=FailureConfig(max_failures=0)),
    )
    try:
        trainer.fit()
        return ray.get(heard.said.remote()), None
    except TrainingFailedError as error:
        reasons = list(getattr(error, "worker_failures", {}).values())
        lost = next((reason for reason in reasons if isinstance(reason, RayError)), None)
        return [], Lost(type(lost).__name__) if lost else str(next(iter(reasons), error)).strip()
    finally:
        shutil.rmtree(kept, ignore_errors=True)


class _Heard:
    """What the first of the workers of a job has to say; Ray Train's own results are measures."""

    def __init__(self) -> None:
        self._said: list[str] = []

    def hear(self, said: list[str]) -> None:
        self._said += said

    def said(self) -> list[str]:
        return self._said


def _train_rank(given: dict[str, Any]) -> None:
    """On each of the workers of a job, between which Ray Train has opened a process group."""
    import ray
    from ray.train.torch import get_device

    from throughline.training.processes import Processes

    heard, ranks = given["heard"], Processes(str(get_device()))
    said, failure = train(**{name: value for name, value in given.items() if name != "heard"}, ranks=ranks)
    if failure:  # the other ranks wait for this one: Ray Train ends them when it raises
        raise TrainingError(failure)
    if ranks.rank == 0:
        ray.get(heard.hear.remote(said))


def measure(precision: str, cpus: float) -> "PlannedDevice":
    """This worker's device: memory and rates."""
    import torch

    from throughline.planning.calibration import find_devices

    torch.set_num_threads(max(1, int(cpus)))
    return find_devices(precision)[0]

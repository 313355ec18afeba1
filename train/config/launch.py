"""Where a job's ranks run: the one description that `engram launch` translates for each launcher."""

from typing import Annotated

from pydantic import BaseModel, Field, model_validator


class SlurmConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """What to request from Slurm, besides nodes and tasks."""

    partition: str | None = None
    """Partition; null: the cluster's default."""
    account: str | None = None
    """Account to charge; null: the user's default."""
    cpus_per_rank: int | None = Field(None, ge=1, le=4_096)
    """Cores per rank. Required."""
    requeue: bool = True
    """Requeue the job when it was preempted, or was saved and ended with checkpoint.interrupted_exit."""
    options: list[str] = []
    """Further options of sbatch, such as `--qos=long`."""


class KubernetesConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """What to request from Kubernetes: each node is a pod of an indexed Job."""

    namespace: str = "default"
    """Namespace of the Job."""
    image: str | None = None
    """Container image with Engram Pretrain installed. Required."""
    workdir: str = "/workspace"
    """Folder in the container that the job's paths are relative to."""
    volumes: dict[str, str] = {}
    """Persistent volume claims, by mount folder. All pods write to them: ReadWriteMany."""
    cpus: int | None = Field(None, ge=1, le=4_096)
    """Cores per pod; null: not set."""
    memory_gib: int | None = Field(None, ge=1, le=1_000_000)
    """Memory per pod, including tables and /dev/shm; null: not set."""
    shm_gib: int = Field(16, ge=1, le=1_000_000)
    """Size of /dev/shm."""
    gpu_resource: str = "nvidia.com/gpu"
    """Resource name of a GPU."""
    retries: int = Field(3, ge=0, le=1_000_000)
    """Pod failures after which the Job fails; interruptions after a save do not count."""

    @model_validator(mode="after")
    def _folders_are_whole_paths(self) -> "KubernetesConfig":
        for key, path in [("workdir", self.workdir), *(("volumes", path) for path in self.volumes)]:
            if not path.startswith("/") or ":" in path:
                raise ValueError(f'{key}: "{path}" is no folder in the container: one that begins with /, without ":"')
        return self


class LaunchConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """Nodes, and the environment of their ranks. `run.nproc` is ranks per node, `run.port` the port they meet on."""

    nodes: int = Field(1, ge=1, le=100_000)
    """Nodes to request, for `slurm` and `kubernetes`."""
    hosts: list[Annotated[str, Field(pattern=r"^[^\s-]\S*$")]] = []
    """Names or addresses of the nodes, for `hosts` and `hostfile`; the ranks meet on the first."""
    ssh: bool = False
    """`hosts`: run the command on every host over ssh; false prints the commands."""
    ssh_options: list[str] = []
    """Further arguments of ssh, for `hosts` and `hostfile`, such as `-p 2222`."""
    min_nodes: int | None = Field(None, ge=1, le=100_000)
    """`hosts`: continue with as few as this many nodes when others are lost; null: all are needed."""
    restarts: int = Field(0, ge=0, le=1_000_000)
    """`hosts`, `kubernetes`: times that torchrun restarts the ranks after one of them failed or a node was lost."""
    gpus: int | None = Field(None, ge=0, le=1_024)
    """GPUs per node; null: one per rank; 0: train on the CPU."""
    threads: int | None = Field(None, ge=1, le=4_096)
    """Threads per rank (OMP_NUM_THREADS); null: its share of the node's cores."""
    interface: str | None = None
    """Network interface between the nodes, for gloo and NCCL; null: the one that reaches the first node."""
    environment: dict[str, str] = {}
    """Environment variables of the ranks."""
    setup: list[str] = []
    """Shell lines before each rank, such as `module load cuda`."""
    timeout_s: float = Field(1800.0, gt=0, le=1_000_000_000)
    """Seconds that ranks wait for each other, at the start and in each collective, before they fail; must be longer
    than a save."""
    time_limit_min: int | None = Field(None, ge=1, le=10_000_000)
    """Minutes after which slurm or kubernetes ends the job; null: the launcher's default."""
    logs: str | None = None
    """Folder for the logs of ranks other than 0; null: `logs` in the run's folder."""
    slurm: SlurmConfig = SlurmConfig()
    """For `--on slurm`."""
    kubernetes: KubernetesConfig = KubernetesConfig()
    """For `--on kubernetes`."""

    @property
    def node_count(self) -> int:
        """Nodes of the job, by whichever key names them."""
        return len(self.hosts) or self.nodes

    @model_validator(mode="after")
    def _hosts_are_enough(self) -> "LaunchConfig":
        if len(set(self.hosts)) < len(self.hosts):
            raise ValueError("hosts names a host twice")
        if self.min_nodes and self.hosts and self.min_nodes > len(self.hosts):
            raise ValueError(f"min_nodes {self.min_nodes} is more than the {len(self.hosts)} hosts")
        return self

    @model_validator(mode="after")
    def _shells_take_the_names(self) -> "LaunchConfig":
        for name in self.environment:
            if not (name.isascii() and name.isidentifier()):
                raise ValueError(f'environment: "{name}" is not a variable name: use only letters, digits and _')
        return self

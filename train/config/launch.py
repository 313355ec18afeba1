"""Where a job's ranks run: the one description from which `engram launch` makes what each engine wants."""

from typing import Annotated

from pydantic import BaseModel, Field, model_validator


class SlurmConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True):
    """What Slurm is asked for, beside nodes and tasks."""

    partition: str | None = None
    """Partition; null takes the cluster's default."""
    account: str | None = None
    """Account that is charged; null takes the user's default."""
    cpus_per_rank: int | None = Field(None, ge=1)
    """Cores of each rank. Needed."""
    requeue: bool = True
    """Queue the job again when it was preempted, or ended with checkpoint.interrupted_exit after it had saved."""
    options: list[str] = []
    """Further options of sbatch, such as `--qos=long`."""


class KubernetesConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True):
    """What Kubernetes is asked for: each node is a pod of an indexed Job."""

    namespace: str = "default"
    """Namespace of the Job."""
    image: str | None = None
    """Container image, in which Engram Pretrain is installed. Needed."""
    workdir: str = "/workspace"
    """Folder in the container from which paths of the job count."""
    volumes: dict[str, str] = {}
    """Persistent volume claims, by the folder at which each is mounted. All pods write to them: ReadWriteMany."""
    cpus: int | None = Field(None, ge=1)
    """Cores of a pod; null sets none."""
    memory_gib: int | None = Field(None, ge=1)
    """Memory of a pod, tables and /dev/shm included; null sets none."""
    shm_gib: int = Field(16, ge=1)
    """Size of /dev/shm."""
    gpu_resource: str = "nvidia.com/gpu"
    """Name of the resource that a GPU is."""
    retries: int = Field(3, ge=0)
    """Failures of pods after which the Job fails; interruptions that saved do not count."""

    @model_validator(mode="after")
    def _folders_are_whole_paths(self) -> "KubernetesConfig":
        for key, path in [("workdir", self.workdir), *(("volumes", path) for path in self.volumes)]:
            if not path.startswith("/") or ":" in path:
                raise ValueError(f'{key}: "{path}" is no folder in the container: one that begins with /, without ":"')
        return self


class LaunchConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True):
    """Nodes, and what their ranks find there. Ranks a node are `run.nproc`, the port they meet on is `run.port`."""

    nodes: int = Field(1, ge=1)
    """Nodes that slurm and kubernetes give to the job."""
    hosts: list[Annotated[str, Field(pattern=r"^[^\s-]\S*$")]] = []
    """Names or addresses of the nodes, for `hosts` and `hostfile`; the ranks meet on the first."""
    ssh: bool = False
    """Let `hosts` start its line on every host over ssh; false prints the lines."""
    ssh_options: list[str] = []
    """Further arguments of ssh, for `hosts` and `hostfile`, such as `-p 2222`."""
    min_nodes: int | None = Field(None, ge=1)
    """`hosts`: go on with as few nodes as this when others are lost; null wants all of them."""
    restarts: int = Field(0, ge=0)
    """`hosts`, `kubernetes`: times that torchrun starts the ranks again after one of them failed or a node was lost."""
    gpus: int | None = Field(None, ge=0)
    """GPUs of a node; null takes one a rank, 0 trains on the CPU."""
    threads: int | None = Field(None, ge=1)
    """Threads of a rank (OMP_NUM_THREADS); null takes its share of the node's cores."""
    interface: str | None = None
    """Network interface between the nodes, for gloo and NCCL; null takes the one by which the first node is reached."""
    environment: dict[str, str] = {}
    """Environment variables of the ranks."""
    setup: list[str] = []
    """Shell lines before each rank, such as `module load cuda`."""
    timeout_s: float = Field(1800.0, gt=0)
    """Seconds that ranks wait for each other, at the start and in each exchange, before they end: more than a save
    takes."""
    time_limit_min: int | None = Field(None, ge=1)
    """Minutes after which slurm or kubernetes ends the job; null takes the engine's default."""
    logs: str | None = None
    """Folder for the logs of ranks other than 0; null takes `logs` in the run's folder."""
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
            raise ValueError("hosts names one of them twice")
        if self.min_nodes and self.hosts and self.min_nodes > len(self.hosts):
            raise ValueError(f"min_nodes {self.min_nodes} is more than the {len(self.hosts)} hosts")
        return self

    @model_validator(mode="after")
    def _shells_take_the_names(self) -> "LaunchConfig":
        for name in self.environment:
            if not (name.isascii() and name.isidentifier()):
                raise ValueError(f'environment: "{name}" is no name of a variable: letters, digits and _ alone')
        return self

"""Hosts known by name: one torchrun command on each, or one of DeepSpeed's launcher for all of them."""

import re

from launch.cluster.layout import CONFIG, RANK_SCRIPT, Launch, Rendered, continued, exports, quoted, rank_script, script
from train.errors import UserError

NODE_SCRIPT = "node.sh"
_HOSTFILE = "hostfile"
_SHELL = re.compile(r"[\s\"'`$&;|<>()*?\\]")
"""Characters in a path that a shell would interpret."""
_SSH = ("-o", "BatchMode=yes", "-o", "ServerAliveInterval=15")  # a lost connection is noticed within a minute


def local(launch: Launch) -> Rendered:
    """Ranks on this machine."""
    return Rendered(
        launch, {RANK_SCRIPT: rank_script(launch)}, [["bash", str(launch.folder / RANK_SCRIPT)]], in_place=True
    )


def hosts(launch: Launch) -> Rendered:
    """torchrun's agent on each of `launch.hosts`, started over ssh or by the user.

    Raises:
        UserError: no hosts, or no ranks per node.
    """
    settings, names = launch.job.launch, _names(launch)
    files = {RANK_SCRIPT: rank_script(launch), NODE_SCRIPT: node_script(launch, names, "number=$1")}
    node = launch.folder / NODE_SCRIPT
    if settings.ssh:
        commands = [
            ["ssh", *_SSH, *settings.ssh_options, name, f"bash {quoted(node)} {number} --attached"]
            for number, name in enumerate(names)
        ]
        may_fail = len(names) - (settings.min_nodes or len(names))
        return Rendered(launch, files, commands, copies=_copies(launch, names), attached=True, may_fail=may_fail)
    lines = [f"  {name}:  bash {quoted(node)} {number}" for number, name in enumerate(names)]
    told = ["Run one line on each host, within ten minutes of each other:", *lines]
    if launch.job.run.local_checkpoints:
        told.insert(0, f"Copy {launch.folder} to the same place on each host.")
    return Rendered(launch, files, told="\n".join(told))


def _copies(launch: Launch, names: list[str]) -> list[list[str]]:
    """The commands that copy the launch's folder to each host, as a tar archive, where they share no disk."""
    if not launch.job.run.local_checkpoints:
        return []
    folder = quoted(launch.folder)
    # One of the hosts may be this one.
    unpack = f"mkdir -p {folder} && tar -x --skip-old-files -C {folder}"
    return [["ssh", *_SSH, *launch.job.launch.ssh_options, name, unpack] for name in names]


def node_script(launch: Launch, names: list[str], number: str) -> str:
    """The shell script of one node: torchrun's agent, and under it the ranks. `number`: the line that sets its number.

    The node's exit code is that of its first rank that failed, and with `--attached` it ends with its standard input.
    """
    settings = launch.job.launch
    nodes = f"{settings.min_nodes}:{len(names)}" if settings.min_nodes else str(len(names))
    agent = continued(
        f'exec {quoted(launch.python)} -P -m launch.cluster.node "${{@:2}}" --',
        f"{quoted(launch.python)} -P -m launch.cluster.agent",
        f"--nnodes={nodes} --nproc-per-node={launch.ranks} --max-restarts={settings.restarts}",
        f"--rdzv-id={quoted(launch.job.run.name)}-{launch.folder.name} --rdzv-backend=c10d",
        f'--rdzv-endpoint="${{hosts[0]}}:{launch.port}" --local-addr="${{hosts[$number]}}"',
        '--rdzv-conf="is_host=$((number == 0)),read_timeout=600"',
        f"--no-python bash {quoted(launch.folder / RANK_SCRIPT)}",
    )
    return script(
        f"One node of the run {launch.job.run.name}: torchrun's agent and its ranks.",
        "set -e",
        f"hosts=({' '.join(map(quoted, names))})",
        number,
        f"cd {quoted(launch.workdir)}",
        *exports({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": f"{launch.job.checkpoint.grace_s:.0f}"}),
        *exports({"PYTHONPATH": str(launch.code)} if launch.code else {}),
        agent,
    )


def hostfile(launch: Launch) -> Rendered:
    """DeepSpeed's launcher, which reaches `launch.hosts` by pdsh over ssh.

    Raises:
        UserError: no hosts, no ranks per node, or a path that DeepSpeed's launcher does not quote.
    """
    names = _names(launch)
    for path in (launch.workdir, launch.folder, launch.python):
        if _SHELL.search(str(path)):
            raise UserError(f"{path}: DeepSpeed's launcher does not quote paths; rename the folder, or use --on hosts")
    files = {
        RANK_SCRIPT: rank_script(launch),
        _HOSTFILE: "".join(f"{name} slots={launch.ranks}\n" for name in names),
    }
    command = [
        *(launch.python, "-m", "deepspeed.launcher.runner", "--hostfile", str(launch.folder / _HOSTFILE)),
        *("--force_multi", "--no_ssh_check", "--launcher", "pdsh", "--launcher_args=-N", "--quiet"),
        *(f"--master_addr={names[0]}", f"--master_port={launch.port}"),
        *("--no_python", "--no_local_rank", str(launch.folder / RANK_SCRIPT)),
    ]
    options = " ".join([*_SSH, *launch.job.launch.ssh_options])
    pdsh = ["env", f"PDSH_SSH_ARGS_APPEND={options}", "pdsh", "-R", "ssh", "-w", ",".join(names)]
    return Rendered(
        launch,
        files,
        [command],
        copies=_copies(launch, names),
        environment={"PDSH_SSH_ARGS_APPEND": options},
        # A signal to DeepSpeed's launcher would cut the ssh sessions, and it would not wait for the ranks.
        ask=[*pdsh, f"pkill -TERM -f {quoted(_ranks_of(launch))} || true"],
    )


def _ranks_of(launch: Launch) -> str:
    """The command lines of a launch's ranks, as a pattern for pkill; not of what starts them."""
    folder = re.sub(r"[][+.^{}]", r"\\\g<0>", str(launch.folder))
    return f"^[^ ]*bash {folder}/{RANK_SCRIPT}$|{folder}/{CONFIG}$"


def _names(launch: Launch) -> list[str]:
    if not launch.job.launch.hosts:
        raise UserError("launch.hosts is empty: name the hosts, as in 'launch.hosts=[node1, node2]'")
    return launch.job.launch.hosts

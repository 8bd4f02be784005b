"""The bed's folder: keys and configurations, and the removal of what dead owners left.

A folder is named after its owner's process number and start time, so that anyone can tell whether
the owner still lives. It is the only thing of a bed that the kernel does not remove by itself.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path

from tools.netbed.requirements import find_command
from tools.netbed.space import KEEPER, call

PREFIX = "netbed"

SSHD_CONFIG = """\
AddressFamily inet
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
AuthenticationMethods publickey
PermitRootLogin prohibit-password
PermitUserRC no
UsePAM no
UseDNS no
StrictModes no
PrintMotd no
PrintLastLog no
PidFile none
MaxStartups 200
MaxSessions 200
"""
"""StrictModes would look at the owners of the folders above the key, up to a shared /tmp."""

SSH_CONFIG = """\
Host *
    IdentityFile {folder}/user_key
    IdentitiesOnly yes
    IdentityAgent none
    UserKnownHostsFile {folder}/known_hosts
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    PasswordAuthentication no
    ConnectTimeout 20
    LogLevel ERROR
"""


def make_folder(hosts: dict[str, str], slots: int) -> Path:
    """A new folder with keys, ssh's configurations, the hosts' names and a hostfile.

    Args:
        hosts: name -> address.
        slots: processes per host in the hostfile.
    """
    pid = os.getpid()
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}-{pid}-{start_time(pid)}-"))
    for name in hosts:
        temporary_folder(folder, name).mkdir()
    keygen = find_command("ssh-keygen") or "ssh-keygen"
    for name in ("host_key", "user_key"):
        call([keygen, "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(folder / name)])
    host_key = (folder / "host_key.pub").read_text().strip()
    names = [f"{address} {name}\n" for name, address in hosts.items()]
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(names))
    (folder / "known_hosts").write_text(
        "".join(f"{name},{address} {host_key}\n" for name, address in hosts.items())
    )
    (folder / "hostfile").write_text("".join(f"{name} slots={slots}\n" for name in hosts))
    (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
    return folder


def temporary_folder(folder: str | os.PathLike[str], host: str) -> Path:
    """A host's own TMPDIR.

    Hosts share the disk and count processes from 1, each: what a program names after its process
    number, as Open MPI's daemons do, would be that of another host, or of a dead one.
    """
    return Path(folder) / f"tmp-{host}"


def remove_leftovers() -> list[Path]:
    """Remove the folders and end the keepers of beds whose owner is dead.

    Only keepers whose own arguments name such a folder are ended.

    Returns:
        The folders that were removed.
    """
    removed = []
    for folder in sorted(Path(tempfile.gettempdir()).glob(f"{PREFIX}-*-*-*")):
        _, pid, started, *_ = folder.name.split("-")
        if not (pid.isdecimal() and folder.is_dir()) or start_time(int(pid)) == started:
            continue
        for keeper in keepers_of(folder):
            _kill(keeper)
        shutil.rmtree(folder, ignore_errors=True)
        removed.append(folder)
    return removed


def keepers_of(folder: Path) -> list[int]:
    """The process numbers of the keepers that were started for a folder."""
    wanted = {os.fsencode(KEEPER), os.fsencode(folder)}
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended meanwhile
            continue
        if wanted <= set(arguments):
            found.append(int(entry.name))
    return found


def start_time(pid: int) -> str | None:
    """When a process was started, in the kernel's ticks since boot; None: there is no such one."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return

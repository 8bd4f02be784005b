"""The first process of a namespace: while it lives the namespace does, and all that runs in it.

Started by `space.py` as a plain file, under `unshare`; imports nothing but the standard library.
It lives until the other end of its standard input is closed, which the kernel does for an owner
that ends in whatever way, killed included.

    keeper.py host FOLDER NAME CORES SSHD    one host: network, processes, names, mounts of its own
    keeper.py switch FOLDER                  the bridge's network; removes FOLDER at the end
"""

import ctypes
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys


def main() -> None:
    """Set the namespace up, say so, and wait for the end."""
    kind, folder = sys.argv[1:3]
    # The process number outside: this namespace still shows the outer /proc.
    pid = os.readlink("/proc/self")
    silence_ipv6()
    if kind == "host":
        name, cores, sshd = sys.argv[3:]
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
        furnish(folder, name)
        serve_ssh(folder, name, sshd)
    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGCHLD, reap)
    print(pid, flush=True)
    reap()
    try:
        while sys.stdin.buffer.read(4096):
            pass
    finally:
        if kind == "switch":
            shutil.rmtree(folder, ignore_errors=True)


def silence_ipv6() -> None:
    """Nobody here speaks it, and its announcements would be counted as traffic."""
    path = "/proc/sys/net/ipv6/conf/default/disable_ipv6"
    if os.path.exists(path):
        with open(path, "w") as switch:
            switch.write("1")


def furnish(folder: str, name: str) -> None:
    """Give the host what would differ between two machines. The disk stays shared."""
    socket.sethostname(name)
    mount("-t", "proc", "proc", "/proc")
    mount("-t", "sysfs", "-o", "ro", "sysfs", "/sys")
    mount("-t", "tmpfs", "tmpfs", "/dev/shm")
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    os.mkdir("/run/sshd", 0o755)
    mount("--bind", f"{folder}/hosts", "/etc/hosts")
    mount("--bind", f"{folder}/ssh_config", "/etc/ssh/ssh_config")
    private = os.path.join(pwd.getpwuid(os.geteuid()).pw_dir, ".ssh")
    if os.path.isdir(private):  # neither read nor written from here on
        mount("-t", "tmpfs", "-o", "mode=700", "tmpfs", private)


def mount(*arguments: str) -> None:
    """Run the command mount; what it says goes to our standard error."""
    subprocess.run(["mount", *arguments], check=True)


def serve_ssh(folder: str, name: str, sshd: str) -> None:
    """Start sshd; it logs into the folder."""
    log = os.open(f"{folder}/{name}.sshd.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    temporary = os.path.join(folder, f"tmp-{name}")  # folder.temporary_folder, without our path
    os.posix_spawn(
        sshd,
        [sshd, "-D", "-e", "-f", f"{folder}/sshd_config", "-o", f"SetEnv=TMPDIR={temporary}"],
        {"PATH": os.environ.get("PATH", os.defpath)},
        file_actions=[
            (os.POSIX_SPAWN_DUP2, null, 0),
            (os.POSIX_SPAWN_DUP2, log, 1),
            (os.POSIX_SPAWN_DUP2, log, 2),
        ],
    )
    os.close(log)
    os.close(null)


def leave(*_: object) -> None:
    """End in order, where somebody ends all of the owner's processes at once."""
    raise SystemExit


def reap(*_: object) -> None:
    """Collect the orphans that a first process inherits."""
    while True:
        try:
            pid, _status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(15, b"netbed-keeper", 0, 0, 0)  # PR_SET_NAME, for ps
    main()

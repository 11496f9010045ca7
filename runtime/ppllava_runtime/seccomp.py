"""A filter of system calls: what a process that decodes never needs, the kernel refuses it.

Of all the rest nothing is refused: it bounds what code that took the process over can do to others,
not what it does to itself.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

# Of each: its name, its number on x86-64, on aarch64. All of them are answered EPERM.
_REFUSED = (
    # Other processes: making them, becoming them, reaching them.
    "fork 57 -, vfork 58 -, execve 59 221, execveat 322 281, ptrace 101 117, "
    "process_vm_readv 310 270, process_vm_writev 311 271, kcmp 312 272, rt_sigqueueinfo 129 138, "
    "rt_tgsigqueueinfo 297 240, setpgid 109 154, setsid 112 157, setpriority 141 140, "
    "ioprio_set 251 30, sched_setaffinity 203 122, sched_setattr 314 274, sched_setparam 142 118, "
    "sched_setscheduler 144 119, migrate_pages 256 238, move_pages 279 239, "
    "get_robust_list 274 100, "
    # Files: fcntl and ioctl too, by which a descriptor sends signals to its owner, whoever that is.
    "open 2 -, openat 257 56, creat 85 -, open_by_handle_at 304 265, name_to_handle_at 303 264, "
    "memfd_create 319 279, fcntl 72 25, ioctl 16 29, truncate 76 45, unlink 87 -, unlinkat 263 35, "
    "rename 82 -, renameat 264 38, renameat2 316 276, link 86 -, linkat 265 37, symlink 88 -, "
    "symlinkat 266 36, mkdir 83 -, mkdirat 258 34, rmdir 84 -, mknod 133 -, mknodat 259 33, "
    "chmod 90 -, fchmod 91 52, fchmodat 268 53, chown 92 -, fchown 93 55, lchown 94 -, "
    "fchownat 260 54, utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88, "
    "setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14, lremovexattr 198 15, "
    "fremovexattr 199 16, chdir 80 49, fchdir 81 50, chroot 161 51, uselib 134 -, "
    "inotify_init 253 -, inotify_init1 294 26, fanotify_init 300 262, splice 275 76, tee 276 77, "
    "vmsplice 278 75, io_setup 206 0, "
    # Who listens, here or elsewhere; what outlives a process.
    "socket 41 198, socketpair 53 199, connect 42 203, bind 49 200, listen 50 201, accept 43 202, "
    "accept4 288 242, sendmsg 46 211, sendmmsg 307 269, recvmsg 47 212, recvmmsg 299 243, "
    "mq_open 240 180, mq_unlink 241 181, msgget 68 186, shmget 29 194, semget 64 190, "
    "add_key 248 217, request_key 249 218, keyctl 250 219, "
    # The machine, and what a process is in it.
    "mount 165 40, umount2 166 39, pivot_root 155 41, unshare 272 97, setns 308 268, "
    "setuid 105 146, setgid 106 144, setreuid 113 145, setregid 114 143, setresuid 117 147, "
    "setresgid 119 149, setgroups 116 159, setfsuid 122 151, setfsgid 123 152, capset 126 91, "
    "personality 135 92, bpf 321 280, perf_event_open 298 241, userfaultfd 323 282, "
    "seccomp 317 277, modify_ldt 154 -, iopl 172 -, ioperm 173 -, init_module 175 105, "
    "finit_module 313 273, delete_module 176 106, kexec_load 246 104, kexec_file_load 320 294, "
    "reboot 169 142, swapon 167 224, swapoff 168 225, acct 163 89, quotactl 179 60, "
    "syslog 103 116, sethostname 170 161, setdomainname 171 162, settimeofday 164 170, "
    "clock_settime 227 112, clock_adjtime 305 266, adjtimex 159 171, vhangup 153 58, "
    "lookup_dcookie 212 18, "
)
# Refused but to the process itself: kill, tkill, tgkill, without which abort() does not end it.
_TO_ITSELF = {"x86_64": (62, 200, 234), "aarch64": (129, 130, 131)}
_CLONE = {"x86_64": 56, "aarch64": 220}
_PRCTL = {"x86_64": 157, "aarch64": 167}
_PRLIMIT = {"x86_64": 302, "aarch64": 261}
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # as the kernel calls them

# From here on numbers mean the same everywhere: pidfd_*, io_uring_*, clone3, openat2 and whatever
# will be added. All are answered as by a kernel that has none of them, so that the C library falls
# back to those before. The calls of x86-64 by 32-bit pointers (x32) are numbered far above.
_FIRST_NEW = 424

_CLONE_THREAD = 0x00010000
_CLONE_NEW = 0x7E020000  # namespaces of every kind
_PR_SET_NAME, _PR_SET_SECCOMP = 15, 22
_SECCOMP_MODE_FILTER = 2

_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # where they are in what a filter sees


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def available() -> bool:
    """Whether this kernel takes a filter, and this machine is one whose calls are known here."""
    if platform.machine() not in _ARCHITECTURES or struct.calcsize("P") != 8:
        return False
    # A filter at no address: a kernel that knows filters looks there, others do not.
    found = ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, 0, 0, 0)
    return bool(found == -1 and ctypes.get_errno() == errno.EFAULT)


def install() -> None:
    """Puts this process, which has one thread and gains no rights, under the filter for good.

    Raises:
        OSError: The kernel does not take it.
    """
    content = program(platform.machine(), os.getpid())
    filter = _Program(len(content) // 8, content)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(filter), 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel takes no filter of system calls")


def program(machine: str, pid: int) -> bytes:
    """The filter of one process: instructions of 8 bytes for the kernel's classic BPF.

    Args:
        machine: "x86_64" or "aarch64".
        pid: Whom it may send signals, which is itself.
    """
    refused = _ERRNO | errno.EPERM
    steps = [
        _step(_LOAD, _ARCHITECTURE),
        _step(_EQUAL, _ARCHITECTURES[machine], 1, 0),
        _step(_RETURN, _KILL),  # numbers of another architecture mean other calls
        _step(_LOAD, _NUMBER),
        _step(_AT_LEAST, _FIRST_NEW, 0, 1),
        _step(_RETURN, _ERRNO | errno.ENOSYS),
    ]
    for number in _refused(machine):
        steps += [_step(_EQUAL, number, 0, 1), _step(_RETURN, refused)]
    for number, mask, expected in (
        *((number, 0xFFFFFFFF, pid) for number in _TO_ITSELF[machine]),
        (_CLONE[machine], _CLONE_THREAD | _CLONE_NEW, _CLONE_THREAD),
        (_PRCTL[machine], 0xFFFFFFFF, _PR_SET_NAME),  # of a thread, which some decoders give it
        (_PRLIMIT[machine], 0xFFFFFFFF, 0),  # its own
    ):
        steps += [
            _step(_EQUAL, number, 0, 5),
            _step(_LOAD, _FIRST_ARGUMENT),  # the lower half; there is nothing to know in the other
            _step(_AND, mask),
            _step(_EQUAL, expected, 0, 1),
            _step(_RETURN, _ALLOW),
            _step(_RETURN, refused),
        ]
    return b"".join([*steps, _step(_RETURN, _ALLOW)])


def _refused(machine: str) -> list[int]:
    column = 1 + list(_ARCHITECTURES).index(machine)
    numbers = [call.split()[column] for call in _REFUSED.rstrip(", ").split(", ")]
    return [int(number) for number in numbers if number != "-"]


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)

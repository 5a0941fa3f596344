"""A filter of system calls, as the bytes that bubblewrap's --seccomp reads.

Resource limits do not reach memory that lives outside of a process's address space (System V shared memory, memfd,
sockets), and processes of one user may write into each other's memory. What is refused here, with the error EPERM, is
what no solution of a programming problem needs. Format: `struct sock_filter` of the kernel's `linux/filter.h`.
"""

from __future__ import annotations

import platform
import struct

# machine: (AUDIT_ARCH_*, column of CALLS), from the kernel's linux/audit.h and the tables of its system calls.
ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
CALLS = {
    # other processes' memory, files and execution
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "perf_event_open": (298, 241),
    # memory that no limit counts
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "socket": (41, 198),
    # large, rarely needed parts of the kernel
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "open_by_handle_at": (304, 265),
    "personality": (135, 92),
    # namespaces and mounts
    "unshare": (272, 97),
    "setns": (308, 268),
    "chroot": (161, 51),
    "pivot_root": (155, 41),
    "mount": (165, 40),
    "umount2": (166, 39),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
}
CLONE, CLONE3, PRLIMIT = (56, 220), (435, 435), (302, 261)
NEW_NAMESPACES = 0x7E020000  # the CLONE_NEW* flags
X32 = 0x40000000  # the bit that marks a second numbering of calls on x86_64

EPERM, ENOSYS = 1, 38
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data, little endian
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000, 0x80000000


def filter_program(machine: str | None = None) -> bytes:
    """The filter for a machine as `platform.machine()` names it, by default this one.

    Raises:
        ValueError: the numbers of its system calls are not known here.

    Example:
        >>> len(filter_program("x86_64")) % 8
        0
    """
    machine = machine or platform.machine()
    if machine not in ARCHITECTURES:
        raise ValueError(f"the sandbox knows the system calls of {sorted(ARCHITECTURES)}, not of {machine!r}")
    audit, column = ARCHITECTURES[machine]
    code = [_op(_LOAD, _ARCHITECTURE), _op(_EQUAL, audit, 1, 0), _op(_RETURN, _KILL), _op(_LOAD, _NUMBER)]
    code += [_op(_AT_LEAST, X32, 0, 1), _op(_RETURN, _REFUSE | EPERM)]
    for numbers in CALLS.values():
        code += [_op(_EQUAL, numbers[column], 0, 1), _op(_RETURN, _REFUSE | EPERM)]
    # Its flags are behind a pointer, where no filter can look; without it the C library takes clone.
    code += [_op(_EQUAL, CLONE3[column], 0, 1), _op(_RETURN, _REFUSE | ENOSYS)]
    code += _refused_if(CLONE[column], _op(_ANY_BIT, NEW_NAMESPACES, 0, 1))
    code += _refused_if(PRLIMIT[column], _op(_EQUAL, 0, 1, 0))  # limits of another process
    return b"".join([*code, _op(_RETURN, _ALLOW)])


def _refused_if(number: int, test: bytes) -> list[bytes]:
    """Refuse a call if a test of its first argument, which skips one instruction where it says no, holds."""
    argument = [_op(_LOAD, _FIRST_ARGUMENT), test, _op(_RETURN, _REFUSE | EPERM), _op(_LOAD, _NUMBER)]
    return [_op(_EQUAL, number, 0, len(argument)), *argument]


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)

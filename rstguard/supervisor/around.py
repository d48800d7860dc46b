"""What of a policy cannot match where this machine stands, as findings with their place in it."""

from __future__ import annotations

from rstguard.engine.ruleset import Scope
from rstguard.kernel import KernelError, place
from rstguard.kernel.seam import Kernel
from rstguard.kernel.standing import Amiss, amiss
from rstguard.policy.check import Around
from rstguard.policy.compile import compile_policy
from rstguard.policy.explain import Finding
from rstguard.policy.model import Policy


def around(kernel: Kernel) -> Around:
    """Return what looks around by a kernel; what cannot be asked is not told."""

    def look(policy: Policy) -> list[Finding]:
        found = stands(kernel, compile_policy(policy).scope)
        return [Finding(one.path, one.sentence) for one in found]

    return look


def stands(kernel: Kernel, scope: Scope) -> list[Amiss]:
    """Return what of a scope cannot match here; nothing if the kernel cannot be asked."""
    try:
        return amiss(scope, place.look(kernel, scope.destinations))
    except KernelError:
        return []

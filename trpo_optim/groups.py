"""Parameter groups that agree on every hyperparameter, checked wherever they change."""

from __future__ import annotations

from typing import Any

import torch

from trpo_optim.closure.parameter_memory import require_shapes
from trpo_optim.closure.parameters import require_real, trainable
from trpo_optim.hyperparameters import Hyperparameters

__all__ = ["AgreeingGroups"]


class AgreeingGroups(torch.optim.Optimizer):
    """An optimizer whose groups hold the same hyperparameters, since one step has one length."""

    _lr_given: bool
    """Whether ``lr`` is a choice of the user's."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with the same hyperparameters as the other groups.

        Args:
            param_group: ``params``, and any hyperparameters; the others take their defaults.

        Raises:
            TrustRegionError: If a parameter is not real, or a hyperparameter is not valid or
                differs from the other groups'.
        """
        lr_given, count = self._lr_given, len(self.param_groups)
        self._lr_given |= "lr" in param_group
        try:
            super().add_param_group(param_group)
            require_real(self.param_groups[-1])
            trainable(self.param_groups)
            Hyperparameters.of_group(self.param_groups[-1])
            self._settings()
        except BaseException:
            del self.param_groups[count:]
            self._lr_given = lr_given
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned: hyperparameters, and what was learned.

        Args:
            state_dict: The saved state.

        Raises:
            TrustRegionError: If another kind of optimizer saved it, or the parameters have other
                shapes.
        """
        checks = Hyperparameters.require_saved, require_shapes  # the last hooks
        handles = [self.register_load_state_dict_pre_hook(check) for check in checks]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
        self._lr_given |= Hyperparameters.of_groups(self.param_groups).lr_is_the_rate

    def _settings(self) -> Hyperparameters:
        """Return the hyperparameters that all groups agree on, after checking them."""
        settings = Hyperparameters.of_groups(self.param_groups)
        self._lr_given |= settings.lr != 1.0  # it was set on the groups, by hand or a schedule
        if not self._lr_given:
            settings.require_lr()
        return settings

"""The plugin manager: the built-in plugins, and the installed ones that `ORPO_PLUGINS_BLOCK` does not keep out."""

import functools
import importlib.metadata
import os
from typing import Any

import pluggy

from orpo_plugins.errors import ConfigError, PluginError
from orpo_plugins.hooks import specs

GROUP = "orpo_plugins"
BLOCK = "ORPO_PLUGINS_BLOCK"
"""Environment variable: names of entry points that are not even imported, with commas between them."""


class PluginManager(pluggy.PluginManager):
    """pluggy's manager, which also knows where a plugin comes from and refuses a function that is no hook."""

    def __init__(self) -> None:
        super().__init__(GROUP)
        self.add_hookspecs(specs)
        self.builtin: set[str] = set()
        """Names of the built-in plugins."""
        self.distributions: dict[str, str] = {}
        """By the names of entry points: "distribution version"."""

    def register(self, plugin: Any, name: str | None = None) -> str | None:
        """pluggy's; raises `PluginError` for a hook with an unknown name, with arguments, or with a wrapper."""
        try:
            registered = super().register(plugin, name)
            self.check_pending()
            for hook in self.get_hookcallers(plugin) or []:
                if any(found.wrapper or found.hookwrapper for found in hook.get_hookimpls()):
                    raise pluggy.PluginValidationError(plugin, f"{hook.name!r} cannot be wrapped")
        except pluggy.PluginValidationError as error:
            if self.is_registered(plugin):
                self.unregister(plugin)
            hooks = ", ".join(hook for hook in dir(specs) if hook.startswith("orpo_"))
            raise PluginError(f"{error}. The hooks are {hooks}; none of them takes an argument") from error
        return registered

    def label(self, name: str) -> str:
        """A plugin's name and where it comes from."""
        if name in self.builtin:
            return f"{name} (built in)"
        if name in self.distributions:
            return f"{name} ({self.distributions[name]})"
        kind = type(self.get_plugin(name))
        # A plugin that was registered without a name goes by its `__name__`, or by its address where it has none.
        return f"{f'{kind.__module__}.{kind.__qualname__}' if name.isdigit() else name} (registered in this process)"

    def third_party(self) -> list[str]:
        """The labels of all active plugins that are not built in."""
        return [self.label(name) for name, plugin in self.list_name_plugin() if plugin and name not in self.builtin]

    def way_out(self, name: str) -> str:
        """How to go on without a plugin, as the end of an error's message."""
        if name in self.distributions:
            return f"Fix the plugin, or keep it out with {BLOCK}={name}"
        return "Fix the plugin, or leave out the call of register() that brings it in"


@functools.cache
def get_plugin_manager() -> PluginManager:
    """The process-wide manager, with the built-in plugins and the installed entry points registered.

    Raises:
        ConfigError: `ORPO_PLUGINS_BLOCK` names an entry point that is not installed.
        PluginError: an entry point cannot be imported, or has a function for a hook that does not exist.
    """
    from orpo_plugins.hooks import builtin

    manager = PluginManager()
    for name, plugin in builtin.plugins().items():
        manager.register(plugin, name=name)
        manager.builtin.add(name)
    entry_points = importlib.metadata.entry_points(group=GROUP)
    blocked = _blocked([entry_point.name for entry_point in entry_points])
    for entry_point in entry_points:
        if entry_point.name not in blocked:
            _load(manager, entry_point)
    return manager


def _blocked(installed: list[str]) -> set[str]:
    names = {name.strip() for name in os.environ.get(BLOCK, "").split(",")} - {""}
    for name in sorted(names - set(installed)):
        known = ", ".join(sorted(installed)) or "none"
        raise ConfigError(f"{BLOCK} names the plugin {name!r}, which is not installed; installed: {known}")
    return names


def _load(manager: PluginManager, entry_point: importlib.metadata.EntryPoint) -> None:
    name = entry_point.name
    distribution = entry_point.dist
    source = "unknown distribution" if distribution is None else f"{distribution.name} {distribution.version}"
    if name in manager.distributions:
        raise PluginError(
            f"two installed packages have a plugin named {name!r}: {manager.distributions[name]} and {source}. "
            f"Uninstall one, or keep both out with {BLOCK}={name}"
        )
    manager.distributions[name] = source
    try:
        manager.register(entry_point.load(), name=name)
    except Exception as error:  # whatever a module raises while it is imported
        raise PluginError(
            f"plugin {name} ({source}) cannot be loaded from {entry_point.value!r}: "
            f"{type(error).__name__}: {error}. {manager.way_out(name)}"
        ) from error

"""The built-in plugins, by the name under which they are registered (and can be unregistered)."""

from types import ModuleType


def plugins() -> dict[str, ModuleType]:
    """Modules whose functions implement the hooks; torch is the heaviest thing that they import."""
    from orpo_plugins.data import row_formats
    from orpo_plugins.kernels import chunked, reference, triton_head
    from orpo_plugins.layouts import encoder_decoder, packed, padded, shared

    # pluggy calls the last one first: of layouts, the first in every list is *padded*.
    return {
        "orpo-row-formats": row_formats,
        "orpo-layout-seq2seq": encoder_decoder,
        "orpo-layout-shared": shared,
        "orpo-layout-packed": packed,
        "orpo-layout-padded": padded,
        "orpo-kernel-reference": reference,
        "orpo-kernel-chunked": chunked,
        "orpo-kernel-triton": triton_head,
    }

"""Every test runs on one thread, and every call of fedexperts.moe has its types and shapes checked."""

from jaxtyping import install_import_hook

install_import_hook("fedexperts.moe", "beartype.beartype")  # before anything imports the library

import torch  # noqa: E402
import transformers  # noqa: E402

torch.set_num_threads(1)
transformers.logging.disable_progress_bar()

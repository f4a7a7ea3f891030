"""Model cards of adapters, and upload to the Hugging Face hub."""

from pathlib import Path

from rite_diffusion.adapters import load_adapter
from rite_diffusion.adapters.card import card
from rite_diffusion.errors import AdapterError
from rite_diffusion.files.writing import check_outputs, user_path, write_atomically

CARD = "README.md"


def write_card(file: str | Path, *, overwrite: bool = False) -> Path:
    """Write an adapter's model card beside its file and return its path.

    OutputError where a README.md exists, unless `overwrite`.
    """
    path = user_path(file)
    text = card(load_adapter(path), path.name)
    target = path.with_name(CARD)
    check_outputs(derived=[target], sources=[path], overwrite=overwrite)
    write_atomically(target, text.encode())
    return target


def push(file: str | Path, repository: str, *, private: bool = True) -> str:
    """Upload an adapter and its card to a hub repository in one commit; returns the commit's URL.

    The repository is created if it does not exist. The token is huggingface_hub's: `hf auth login`
    or `HF_TOKEN`. Raises AdapterError where the upload fails.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    path = user_path(file)
    if path.is_dir():
        raise AdapterError(
            f"{path} is a folder: make one file of it with `rite convert --to kohya`."
        )
    text = card(load_adapter(path), path.name)
    files = [
        CommitOperationAdd(path.name, path.read_bytes()),
        CommitOperationAdd(CARD, text.encode()),
    ]
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.create_commit(repository, files, commit_message=f"Add {path.name}")
    except (HTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise AdapterError(
            f"{path.name} was not uploaded to '{repository}' ({reason}): check the name and the "
            "network, and log in with `hf auth login`"
        ) from None
    return str(done.commit_url)

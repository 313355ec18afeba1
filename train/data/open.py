"""From the `data` section of a job to an open token store."""

from train.data.config import DataConfig
from train.data.preparation.corpus import default_corpus
from train.data.stores.store import TokenStore
from train.data.tokenization.tokenizer import Tokenizer
from train.errors import UserError


def open_data(config: DataConfig, *, progress: bool = True) -> TokenStore:
    """The job's token store; the default corpus is prepared if it is not yet.

    May be called by all ranks at once; where some share no disk, once per node.

    Raises:
        UserError: nothing usable at `data.path`, a tokenizer that does not fit, no room for the default corpus.
    """
    if config.path is not None:
        tokenizer = None if config.tokenizer is None else Tokenizer.load(config.tokenizer)
        return TokenStore.open(config.path, tokenizer=tokenizer, how=config.elsewhere)
    folder = default_corpus(
        config.cache,
        bpe_vocab=config.bpe_vocab,
        tokenizer=config.tokenizer,
        workers=config.workers,
        progress=progress,
    )
    try:
        return TokenStore.open(folder)
    except UserError as error:
        raise UserError(f"{error}. It is a cache: delete {folder} and start again") from None

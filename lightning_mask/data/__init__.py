"""Data for the tasks: texts and images, from packages, from the user's files, or from the Hugging Face hub.

What a data module needs beyond Lightning (transformers, datasets, the packages that carry data) is imported when it is used.
"""

from lightning_mask.data.images import ImageData, ImageSplits, folder, mnist5k, shifted
from lightning_mask.data.language import LanguageData
from lightning_mask.data.loading import ResumableLoader, eval_loader, train_loader
from lightning_mask.data.sources import debates, hub, reviews, table, tweets
from lightning_mask.data.splits import Texts, TextSplits
from lightning_mask.data.text import TextData

__all__ = [
    "ImageData",
    "ImageSplits",
    "LanguageData",
    "ResumableLoader",
    "TextData",
    "TextSplits",
    "Texts",
    "debates",
    "eval_loader",
    "folder",
    "hub",
    "mnist5k",
    "reviews",
    "shifted",
    "table",
    "train_loader",
    "tweets",
]

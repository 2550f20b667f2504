"""Where images to be packed come from: folders, archives, tables, shards; local or remote.

:func:`list_source` tells what a source is and lists its images; :meth:`SourceImage.read` reads one.
"""

from pipelines.sources.images import Listing as Listing
from pipelines.sources.images import SourceImage as SourceImage
from pipelines.sources.images import SourceOptions as SourceOptions
from pipelines.sources.images import sort_class_names as sort_class_names
from pipelines.sources.listing import list_source as list_source

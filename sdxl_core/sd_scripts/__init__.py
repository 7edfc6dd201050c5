"""Coming from sd-scripts: its command lines as our TOML, option by option."""

from sdxl_core.sd_scripts.importing import Imported, import_command
from sdxl_core.sd_scripts.options import Option, option_table
from sdxl_core.sd_scripts.text import as_toml, options_markdown

__all__ = ["Imported", "Option", "as_toml", "import_command", "option_table", "options_markdown"]

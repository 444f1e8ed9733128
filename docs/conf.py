"""Sphinx settings. The pages are the executed notebooks, processed by nbdev; tools/docs.py puts them in place."""
project = "mits_nb"
author = copyright = "The mits_nb authors"
root_doc = "contents"
extensions = ["myst_nb"]
html_theme = "sphinx_book_theme"
html_title = "mits_nb"
html_theme_options = {
    "repository_url": "https://github.com/mits-nb/mits_nb",
    "use_repository_button": True,
    "path_to_docs": "nbs",
    "show_navbar_depth": 1,
}
# chapters are committed executed: the site shows what was measured then
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
# every chapter is a page with one H1; its numbered equations use \tag
suppress_warnings = ["mystnb.unknown_mime_type"]

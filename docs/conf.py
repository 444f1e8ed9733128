"""Sphinx settings. The pages are the committed notebooks as tools/docs.py prepares them; it puts this file beside them."""
project = "mits_nb"
author = copyright = "The mits_nb authors"
root_doc = "index"
extensions = ["myst_nb"]
html_theme = "sphinx_book_theme"
html_title = "mits_nb"
html_static_path = ["_static"]
html_css_files = ["mits_nb.css"]
html_copy_source = html_show_sourcelink = False
mathjax_path = "mathjax/tex-chtml.js"
html_theme_options = {
    "repository_url": "https://github.com/mits-nb/mits_nb",
    "use_repository_button": True,
    "use_download_button": False,
    "show_navbar_depth": 1,
    "max_navbar_depth": 1,
    "show_toc_level": 1,
    "home_page_in_toc": True,
}
# chapters are committed executed: the site shows what was measured then
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
# every chapter is a page with one H1; its numbered equations use \tag
suppress_warnings = ["mystnb.unknown_mime_type"]

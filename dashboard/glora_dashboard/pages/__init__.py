"""The pages that people see, built with NiceGUI: they read queries and send commands, and decide nothing."""

from glora_dashboard.pages.mounting import mount_pages
from glora_dashboard.pages.site import Access, Site

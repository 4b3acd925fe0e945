r"""The method inside training engines, for runs that outgrow one machine's own loop; see README.md in this folder."""

"""A broker's core under a clock of its own, with clients and workers that are models: what would these settings do?"""

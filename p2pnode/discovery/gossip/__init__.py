"""The gossip of offers: items, views, news along a tree, comparison of books, watch over publishers; and offers by topic."""

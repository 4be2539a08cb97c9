"""Offers, quotes, orders, agreements, receipts, cheques and the books behind them. Imports layers 0 to 5."""

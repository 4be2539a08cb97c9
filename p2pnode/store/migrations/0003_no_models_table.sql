-- Models lie as files of their own, named by their hash; nothing ever wrote this table.
DROP TABLE models;

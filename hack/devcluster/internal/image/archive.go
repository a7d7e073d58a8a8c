// Package image writes container images as archives that docker, podman and
// containerd can load, without any of them, and loads them into a node.
package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Image is one layer of files and how to run it.
type Image struct {
	// Name is what it is called once loaded, such as example.org/tool:1.
	Name string
	// Architecture in Go's words: amd64, arm64.
	Architecture string
	// Files maps a path in the image to a file here. Executable files are so
	// in the image as well.
	Files      map[string]string
	Entrypoint []string
	// User is numeric, so that a cluster can see that it is not root.
	User   string
	Env    []string
	Labels map[string]string
	// Created goes into the image. Everything in an image has this time: the
	// same files make the same image.
	Created time.Time
}

// The formats are those of the OCI image specification, v1.
type (
	descriptor struct {
		MediaType   string            `json:"mediaType"`
		Digest      string            `json:"digest"`
		Size        int64             `json:"size"`
		Platform    *platform         `json:"platform,omitempty"`
		Annotations map[string]string `json:"annotations,omitempty"`
	}
	platform struct {
		Architecture string `json:"architecture"`
		OS           string `json:"os"`
	}
	manifest struct {
		SchemaVersion int          `json:"schemaVersion"`
		MediaType     string       `json:"mediaType"`
		Config        descriptor   `json:"config"`
		Layers        []descriptor `json:"layers"`
	}
	index struct {
		SchemaVersion int          `json:"schemaVersion"`
		MediaType     string       `json:"mediaType"`
		Manifests     []descriptor `json:"manifests"`
	}
	runConfig struct {
		User       string            `json:"User,omitempty"`
		Env        []string          `json:"Env,omitempty"`
		Entrypoint []string          `json:"Entrypoint"`
		WorkingDir string            `json:"WorkingDir"`
		Labels     map[string]string `json:"Labels,omitempty"`
	}
	imageConfig struct {
		Created      time.Time `json:"created"`
		Architecture string    `json:"architecture"`
		OS           string    `json:"os"`
		Config       runConfig `json:"config"`
		RootFS       struct {
			Type    string   `json:"type"`
			DiffIDs []string `json:"diff_ids"`
		} `json:"rootfs"`
	}
	// dockerManifest is what 'docker load' reads.
	dockerManifest struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
)

const (
	mediaIndex    = "application/vnd.oci.image.index.v1+json"
	mediaManifest = "application/vnd.oci.image.manifest.v1+json"
	mediaConfig   = "application/vnd.oci.image.config.v1+json"
	mediaLayer    = "application/vnd.oci.image.layer.v1.tar"
)

// Write writes the archive: an OCI image layout which is a docker archive as
// well.
func (image Image) Write(to io.Writer) error {
	if !strings.Contains(path.Base(image.Name), ":") {
		return fmt.Errorf("image name %q lacks a tag", image.Name)
	}
	layer, err := image.layer()
	if err != nil {
		return err
	}
	config := imageConfig{
		Created: image.Created.UTC(), Architecture: image.Architecture, OS: "linux",
		Config: runConfig{User: image.User, Env: image.Env, Entrypoint: image.Entrypoint, WorkingDir: "/", Labels: image.Labels},
	}
	config.RootFS.Type = "layers"
	config.RootFS.DiffIDs = []string{digest(layer)}

	archive := &writer{tar: tar.NewWriter(to), time: image.Created}
	layerBlob := archive.blob(mediaLayer, layer)
	configBlob := archive.json(mediaConfig, config)
	manifestBlob := archive.json(mediaManifest, manifest{2, mediaManifest, configBlob, []descriptor{layerBlob}})
	manifestBlob.Platform = &platform{image.Architecture, "linux"}
	manifestBlob.Annotations = map[string]string{
		"io.containerd.image.name":          fullName(image.Name),
		"org.opencontainers.image.ref.name": image.Name[strings.LastIndex(image.Name, ":")+1:],
	}
	archive.file("index.json", encode(index{2, mediaIndex, []descriptor{manifestBlob}}))
	archive.file("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	archive.file("manifest.json", encode([]dockerManifest{{
		Config: configBlob.path(), RepoTags: []string{image.Name}, Layers: []string{layerBlob.path()},
	}}))
	return archive.close()
}

// fullName is the name as containerd keeps it: one without a registry is of
// Docker's, as a cluster takes it to be.
func fullName(name string) string {
	first, _, found := strings.Cut(name, "/")
	switch {
	case !found:
		return "docker.io/library/" + name
	case first == "localhost" || strings.ContainsAny(first, ".:"):
		return name
	default:
		return "docker.io/" + name
	}
}

// WriteFile writes the archive into a file, in one step.
func (image Image) WriteFile(name string) error {
	file, err := os.CreateTemp(filepath.Dir(name), filepath.Base(name)+".*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(file.Name()) }() // no longer there after success
	if err := errors.Join(image.Write(file), file.Chmod(0o644), file.Close()); err != nil {
		return err
	}
	return os.Rename(file.Name(), name)
}

// layer is a tar file of the image's files and the directories they are in.
func (image Image) layer() ([]byte, error) {
	var buffer bytes.Buffer
	archive := &writer{tar: tar.NewWriter(&buffer), time: image.Created}
	names := make([]string, 0, len(image.Files))
	for name := range image.Files {
		if !path.IsAbs(name) || path.Clean(name) != name {
			return nil, fmt.Errorf("%q is not a plain absolute path", name)
		}
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		content, err := os.ReadFile(image.Files[name])
		if err != nil {
			return nil, err
		}
		info, err := os.Stat(image.Files[name])
		if err != nil {
			return nil, err
		}
		mode := int64(0o644)
		if info.Mode().Perm()&0o111 != 0 {
			mode = 0o755
		}
		archive.directories(path.Dir(name))
		archive.add(strings.TrimPrefix(name, "/"), mode, content)
	}
	err := archive.close()
	return buffer.Bytes(), err
}

// writer writes a tar file and remembers the first error.
type writer struct {
	tar  *tar.Writer
	time time.Time
	made []string
	err  error
}

func (w *writer) header(header tar.Header) {
	header.ModTime, header.Format = w.time, tar.FormatUSTAR
	if w.err == nil {
		w.err = w.tar.WriteHeader(&header)
	}
}

// directories writes a directory and those above it, once.
func (w *writer) directories(dir string) {
	if dir == "/" || slices.Contains(w.made, dir) {
		return
	}
	w.directories(path.Dir(dir))
	w.made = append(w.made, dir)
	w.header(tar.Header{Typeflag: tar.TypeDir, Name: strings.TrimPrefix(dir, "/") + "/", Mode: 0o755})
}

func (w *writer) add(name string, mode int64, content []byte) {
	w.header(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(content))})
	if w.err == nil {
		_, w.err = w.tar.Write(content)
	}
}

func (w *writer) file(name string, content []byte) { w.add(name, 0o644, content) }

// blob writes content under its digest.
func (w *writer) blob(mediaType string, content []byte) descriptor {
	blob := descriptor{MediaType: mediaType, Digest: digest(content), Size: int64(len(content))}
	w.directories("/blobs/sha256")
	w.file(blob.path(), content)
	return blob
}

func (w *writer) json(mediaType string, value any) descriptor {
	return w.blob(mediaType, encode(value))
}

func (w *writer) close() error {
	if w.err != nil {
		return w.err
	}
	return w.tar.Close()
}

func (d descriptor) path() string { return "blobs/" + strings.Replace(d.Digest, ":", "/", 1) }

func digest(content []byte) string {
	sum := sha256.Sum256(content)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// encode cannot fail: the types above hold nothing that JSON has no form for.
func encode(value any) []byte {
	content, err := json.Marshal(value)
	if err != nil {
		panic(err)
	}
	return content
}
